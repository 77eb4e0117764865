"""Boots a Debian 12 in systemd-nspawn, gives it holdfast as packaging/holdfast.service, and runs service_test in it.

    run.py TEST BIN_FOLDER [GoogleTest arguments]      (scripts/make-nspawn-root has been run)

Leaves nothing behind: the root folder is mounted read-only under a tmpfs, everything else lies in a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_BOOT_SECONDS = 120
_TEST_SECONDS = 420
_CONFIG = "[cache]\nfree_floor = 0\n"


class Container:
    """A booted container; the destructor's work is in end()."""

    def __init__(self, root: Path, folder: Path, binds: list[str]) -> None:
        self._log = (folder / "console").open("wb")
        command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay",
                   "--console=pipe", f"--machine=holdfast-{os.getpid()}", "--bind=/dev/fuse",
                   "--tmpfs=/var/lib/holdfast:mode=0711", "-D", str(root), *binds]  # fmt: skip
        self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        self.console = folder / "console"
        self._init = 0

    def wait(self) -> None:
        """Until systemd has reached its default target."""
        deadline = time.monotonic() + _BOOT_SECONDS
        state = "not started"
        while time.monotonic() < deadline and self._nspawn.poll() is None:
            self._init = self._init or self._find_init()
            if self._init:
                state = self.run(["systemctl", "is-system-running"], 20, capture=True).stdout.strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.2)
        raise SystemExit(f"the container did not boot ({state}):\n{self.console.read_text(errors='replace')[-3000:]}")

    def run(self, command: list[str], seconds: float, capture: bool = False) -> subprocess.CompletedProcess[str]:
        words = ["nsenter", f"--target={self._init}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root",
                 "--wdns=/", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=/run", *command]  # fmt: skip
        pipe = subprocess.PIPE if capture else None
        try:
            return subprocess.run(words, timeout=seconds, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", "")

    def end(self) -> None:
        """Kills the container's PID 1, with which the kernel ends everything in it, also readers that hang."""
        init = self._init or self._find_init()
        if init:
            os.kill(init, signal.SIGKILL)
        try:
            self._nspawn.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._log.close()

    def _find_init(self) -> int:
        """nspawn's child that is PID 1 of its own namespace, once it has become systemd."""
        try:
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
            for child in children:
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        except OSError:
            pass
        return 0


class MemoryGroup:
    """A memory control group on the host, bound into the container. With cgroup v2 none is needed: systemd has its own."""

    def __init__(self) -> None:
        base = Path("/sys/fs/cgroup/memory")
        self._path = base / f"holdfast-nspawn-{os.getpid()}" if (base / "memory.limit_in_bytes").exists() else None
        if self._path:
            self._path.mkdir()
        self.binds = [f"--bind={self._path}:/run/memory-group"] if self._path else []

    def end(self) -> None:
        deadline = time.monotonic() + 10
        while self._path and self._path.exists() and time.monotonic() < deadline:
            try:
                self._path.rmdir()
            except OSError:
                time.sleep(0.1)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    test, binaries = Path(sys.argv[1]), Path(sys.argv[2])
    source = Path(os.environ["HOLDFAST_SOURCE"])
    root = Path(os.environ.get("HOLDFAST_CACHE", source / ".cache")) / "nspawn/root"
    if not root.exists() or shutil.which("systemd-nspawn") is None:
        print("the container's root or systemd-nspawn is missing: scripts/install-deps, scripts/make-nspawn-root",
              file=sys.stderr)  # fmt: skip
        return 1
    memory = MemoryGroup()
    container = None
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-nspawn-") as name:
            folder = Path(name)
            (folder / "config.toml").write_text(_CONFIG)
            files = {
                binaries / "holdfast-supervisor": "/usr/bin/holdfast-supervisor",
                binaries / "holdfastctl": "/usr/bin/holdfastctl",
                binaries / "holdfast-verifier": "/usr/lib/holdfast/holdfast-verifier",
                binaries / "holdfast-worker": "/usr/lib/holdfast/holdfast-worker",
                source / "packaging/holdfast.service": "/etc/systemd/system/holdfast.service",
                folder / "config.toml": "/etc/holdfast/config.toml",
                test: "/usr/lib/holdfast/service_test",
            }
            binds = [f"--bind-ro={host}:{inside}" for host, inside in files.items()]
            container = Container(root, folder, [*binds, *memory.binds])
            started = time.monotonic()
            container.wait()
            print(f"booted after {time.monotonic() - started:.1f} s", flush=True)
            result = container.run(["/usr/lib/holdfast/service_test", *sys.argv[3:]], _TEST_SECONDS).returncode
            if result == 124:
                print(f"not finished after {_TEST_SECONDS} s; the journal's end:", flush=True)
                container.run(["journalctl", "--no-pager", "-n", "80"], 20)
            return result
    finally:
        if container is not None:
            container.end()
        memory.end()


if __name__ == "__main__":
    sys.exit(main())
