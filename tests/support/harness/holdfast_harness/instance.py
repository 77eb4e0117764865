"""A private instance: one temporary folder, and everything started for it.

    with Instance("lifecycle") as box:
        registry = box.registry()
        holdfast = box.holdfast()
        containerd = box.containerd(holdfast)

At the end of the block nothing is left: containers, shims, daemons, mounts, cgroups, files. The same holds when the
block raises, when the process gets a signal, and (by the reaper) when it is killed.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import mounts, teardown
from .errors import HarnessError
from .process import Daemon

if TYPE_CHECKING:
    from .containerd import Containerd
    from .holdfast import Holdfast
    from .registry import Registry, SlowProxy


def require_root() -> None:
    if os.geteuid() != 0:
        raise HarnessError("this needs root (mounts and containers): run it with sudo")
    if not Path("/dev/fuse").exists():
        raise HarnessError("there is no /dev/fuse: load the kernel module with `modprobe fuse`")


def base_folder() -> Path:
    """Where instances live. Unix socket paths are limited to 107 bytes and overlayfs needs a real file system: hence
    not $TMPDIR."""
    return Path(os.environ.get("HOLDFAST_TEST_DIR", "/var/tmp"))


def free_port() -> int:
    """A loopback port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Instance:
    """Owns the folder and the order in which things end: containers first, then daemons, the latest first."""

    def __init__(self, name: str):
        require_root()
        # Also a containerd namespace, which must not hold an underscore beside a hyphen, as mkdtemp's names may.
        self.root = base_folder() / f"hf-{name}-{secrets.token_hex(4)}"
        self.root.mkdir(mode=0o711)
        self.namespace = self.root.name  # also the name of the containers' cgroup
        self._daemons: list[Daemon] = []
        self._kept = False
        mounts.mount_fusectl()
        self._reaper = teardown.start_reaper(self.root)

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            self.print_logs()
        if not self._kept:
            self.close()

    def keep(self) -> None:
        """Leaves everything running when the block ends (`end` it later with scripts/quickstart --end)."""
        self._kept = True
        teardown.dismiss_reaper(self._reaper)

    def close(self) -> None:
        teardown.end_containers(self.root)
        for daemon in reversed(self._daemons):
            daemon.stop()
        problems = teardown.end_all(self.root)
        teardown.dismiss_reaper(self._reaper)
        if problems:
            raise HarnessError("left behind: " + "; ".join(problems))

    def print_logs(self, size: int = 2500) -> None:
        """The ends of all daemons' logs, for the report of a failed test."""
        from .process import tail

        for log in sorted((self.root / "logs").glob("*.log")):
            print(f"--- {log.name}\n{tail(log, size)}", file=sys.stderr)

    def daemon(
        self,
        name: str,
        command: list[Any],
        env: dict[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> Daemon:
        started = Daemon(name, command, self.root, env, stop_signal)
        self._daemons.append(started)
        return started

    def registry(self, **options: Any) -> Registry:
        from .registry import Registry

        return Registry(self, **options)

    def slow_proxy(self, upstream: str, **options: Any) -> SlowProxy:
        from .registry import SlowProxy

        return SlowProxy(self, upstream, **options)

    def holdfast(self, **options: Any) -> Holdfast:
        from .holdfast import Holdfast

        return Holdfast(self, **options)

    def containerd(self, holdfast: Holdfast | None = None, **options: Any) -> Containerd:
        from .containerd import Containerd

        return Containerd(self, holdfast, **options)
