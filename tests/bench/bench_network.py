"""Two network namespaces joined by an emulated link (holdfast-link): "registry" on one side, "node" on the other."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
from holdfast_harness.errors import HarnessError  # noqa: E402
from holdfast_harness.holdfast import binary  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.process import run, wait_for  # noqa: E402

REGISTRY_IP = "10.77.0.1"
NODE_IP = "10.77.0.2"
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            raise HarnessError(f"setns {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


class Network:
    """Everything started after `enter(side)` lives on that side. Namespaces and link end with the block."""

    def __init__(self, box: Instance, mbit: float, rtt_ms: float):
        self._home = f"/proc/{os.getpid()}/fd/{os.open('/proc/self/ns/net', os.O_RDONLY)}"
        self._names = {side: f"hf{os.getpid()}-{side}" for side in ("registry", "node")}
        self.mbit, self.rtt_ms = mbit, rtt_ms
        self._box = box
        self._made: list[str] = []

    def __enter__(self) -> Network:
        for name in self._names.values():
            run(["ip", "netns", "add", name])
            self._made.append(name)
        ready = self._box.root / "link-ready"
        self._link = self._box.daemon(
            "link",
            [binary("holdfast-link"), "--ns-a", self._names["registry"], "--ns-b", self._names["node"]]
            + ["--ip-a", f"{REGISTRY_IP}/30", "--ip-b", f"{NODE_IP}/30"]
            + ["--mbit", self.mbit, "--rtt-ms", self.rtt_ms, "--ready-file", ready],
        )
        wait_for("the emulated link", ready.exists, 20)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _setns(self._home)
        self._link.stop()
        for name in self._made:
            run(["ip", "netns", "del", name], check=False)

    def enter(self, side: str) -> None:
        """Moves this process (its main thread, and so its later children) to "registry" or "node"."""
        _setns(f"/run/netns/{self._names[side]}")

    @staticmethod
    def received_bytes() -> int:
        """Bytes that came over the link to the side this process is on, headers included."""
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            if line.strip().startswith("link0:"):
                return int(line.split(":")[1].split()[0])
        raise HarnessError("this process is on no side of the link")

    def describe(self) -> str:
        return f"{self.mbit:g} Mbit/s, {self.rtt_ms:g} ms round trip (emulated, 512 KiB queue)"
