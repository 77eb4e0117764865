"""Boots Debian 12's kernel 6.1 in QEMU without KVM with nothing but holdfast, its libraries and survival_test in the initramfs.

    run.py TEST SUPERVISOR VERIFIER WORKER      (scripts/get-old-kernel has been run)

The machine's serial console is printed. It must end with the line `HOLDFAST-VERDICT 0`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SECONDS = 560
_VERDICT = re.compile(r"^HOLDFAST-VERDICT (\d+)\s*$", re.MULTILINE)
_INIT = """#!/bin/sh
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /tmp
insmod /modules/fuse.ko
insmod /modules/overlay.ko
ip link set lo up
export HOLDFAST_BIN=/bin HOLDFAST_SOURCE=/ HOLDFAST_EXPECT_KERNEL=6.1. TMPDIR=/tmp PATH=/bin
echo "HOLDFAST-BOOTED $(uname -r)"
/bin/survival_test
echo "HOLDFAST-VERDICT $?"
poweroff -f
"""


class Cpio:
    """A writer of the kernel's initramfs format (newc)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._folders: set[str] = set()
        self._number = 0

    def add(self, name: str, content: bytes, mode: int = 0o100755) -> None:
        for parent in reversed(Path(name).parents):
            folder = str(parent)
            if folder != "." and folder not in self._folders:
                self._folders.add(folder)
                self._entry(folder, b"", 0o40755)
        self._entry(name, content, mode)

    def folder(self, name: str) -> None:
        self._folders.add(name)
        self._entry(name, b"", 0o40755)

    def close(self) -> None:
        self._entry("TRAILER!!!", b"", 0)
        self._file.close()

    def _entry(self, name: str, content: bytes, mode: int) -> None:
        self._number += 1
        raw = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        self._file.write(b"070701" + b"".join(b"%08x" % field for field in fields) + raw)
        self._pad()
        self._file.write(content)
        self._pad()

    def _pad(self) -> None:
        self._file.write(b"\0" * (-self._file.tell() % 4))


def libraries(programs: list[Path]) -> set[Path]:
    """What the dynamic linker would load for them, and the linker itself."""
    found = set()
    for program in programs:
        said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
        missing = [line for line in said.splitlines() if "not found" in line]
        if missing:
            raise SystemExit(f"{program} lacks libraries: {missing}")
        found |= {Path(word) for word in re.findall(r"(/\S+) \(0x", said)}
    return found


def loaded_later() -> list[Path]:
    """What the worker loads when it first needs it (worker/fetch/libcurl.h)."""
    known = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    paths = re.findall(r"libcurl\.so\.4 .*=> (\S+)", known)
    if not paths:
        raise SystemExit("libcurl.so.4 is missing: scripts/install-deps")
    return [Path(paths[0])]


def make_initramfs(target: Path, kernel: Path, programs: list[Path], folder: Path) -> None:
    archive = Cpio(target)
    for name in ("proc", "sys", "dev", "tmp", "run", "var"):
        archive.folder(name)
    busybox = Path("/bin/busybox").read_bytes()
    archive.add("bin/busybox", busybox)
    for applet in ("sh", "mount", "insmod", "ip", "uname", "poweroff", "echo"):
        archive.add(f"bin/{applet}", b"busybox", 0o120777)
    archive.add("init", _INIT.encode())
    for program in programs:
        stripped = folder / program.name
        subprocess.run(["strip", "-o", stripped, program], check=True)
        archive.add(f"bin/{program.name}", stripped.read_bytes())
    late = loaded_later()
    for library in sorted({*libraries([*programs, *late]), *late}):
        archive.add(str(library).lstrip("/"), library.read_bytes())
    # getaddrinfo and getpwuid ask these; glibc loads no module for `files`.
    archive.add("etc/nsswitch.conf", b"passwd: files\nhosts: files\n", 0o100644)
    archive.add("etc/hosts", b"127.0.0.1 localhost\n", 0o100644)
    archive.add("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o100644)
    for module in ("fuse.ko", "overlay.ko"):
        archive.add(f"modules/{module}", (kernel / module).read_bytes(), 0o100644)
    archive.close()


def boot(kernel: Path, initramfs: Path, log: Path) -> str:
    """What the serial console said until the machine switched itself off, or the time was up."""
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
               "-kernel", kernel / "vmlinuz", "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1",
               "-nographic", "-no-reboot", "-nic", "none"]  # fmt: skip
    with log.open("wb") as sink:
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
        try:
            machine.wait(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            sink.write(f"\nrun.py: not finished after {_SECONDS} s\n".encode())
        finally:
            machine.kill()
            machine.wait()
    return log.read_text(errors="replace")


def main() -> int:
    if len(sys.argv) != 5:
        print(__doc__, file=sys.stderr)
        return 2
    programs = [Path(word) for word in sys.argv[1:]]
    source = Path(os.environ["HOLDFAST_SOURCE"])
    kernel = Path(os.environ.get("HOLDFAST_CACHE", source / ".cache")) / "oldkernel"
    if not (kernel / "vmlinuz").exists() or shutil.which("qemu-system-x86_64") is None:
        print("the old kernel or QEMU is missing: scripts/install-deps, scripts/get-old-kernel", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="holdfast-oldkernel-") as name:
        folder = Path(name)
        make_initramfs(folder / "initramfs", kernel, programs, folder)
        started = time.monotonic()
        said = boot(kernel, folder / "initramfs", folder / "console")
    print(said)
    verdict = _VERDICT.search(said)
    passed = verdict is not None and verdict.group(1) == "0" and "HOLDFAST-BOOTED 6.1." in said
    print(f"old kernel: {'passed' if passed else 'FAILED'} after {time.monotonic() - started:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
