"""Ends everything that belongs to an instance's folder, knowing nothing but that folder.

Used by Instance at its end and by the reaper (reaper.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import mounts, process

_CGROUPS = Path("/sys/fs/cgroup")


def _shims(root: Path) -> list[int]:
    found = []
    for pid in process.processes_of(root):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"containerd-shim" in command.split(b"\0")[0]:
            found.append(pid)
    return found


def _shim_sockets(root: Path) -> list[Path]:
    """Shims put their sockets into a folder of the host's; each bundle names its own."""
    found = []
    for address in root.glob("*/state/io.containerd.runtime.v2.task/*/*/address"):
        try:
            socket = Path(address.read_text().removeprefix("unix://"))
        except OSError:
            continue
        if socket.parent == Path("/run/containerd/s"):
            found.append(socket)
    return found


def _remove_cgroups(name: str) -> None:
    for folder in [*_CGROUPS.glob(f"*/{name}"), *_CGROUPS.glob(name)]:
        for inner, _, _ in os.walk(folder, topdown=False):
            try:
                os.rmdir(inner)
            except OSError:
                pass


def end_containers(root: Path) -> None:
    """Kills all containers, then their shims. Readers stuck in FUSE go when their connection is aborted (`end_all`)."""
    sockets = _shim_sockets(root)
    shims = _shims(root)
    inside = [pid for pid in process.processes_of(root) if process.parent_of(pid) in shims]
    process.kill_and_wait(inside, patience=3)
    process.kill_and_wait(shims, patience=3)
    for socket in sockets:
        socket.unlink(missing_ok=True)


def end_all(root: Path) -> list[str]:
    """Leaves no process, mount, cgroup or file of the instance. What could not be removed, in words."""
    end_containers(root)
    left = process.kill_and_wait(process.processes_of(root), patience=3)
    if left:
        mounts.abort_fuse_below(root)
        left = process.kill_and_wait(left, patience=5)
    problems = [f"process {pid} cannot be killed" for pid in left]
    problems += [f"{mount.point} cannot be unmounted" for mount in mounts.unmount_below(root)]
    _remove_cgroups(root.name)
    if not problems:  # never delete through a mount
        shutil.rmtree(root, ignore_errors=True)
        if root.exists():
            problems.append(f"{root} cannot be deleted")
    return problems


def start_reaper(root: Path) -> int:
    """A detached process that runs `end_all(root)` once the returned descriptor is closed without a word."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, False)
    package = Path(__file__).parent
    subprocess.run(  # the intermediate child ends at once, so that the reaper is nobody's child
        [sys.executable, "-m", "holdfast_harness.reaper", str(root)],
        stdin=reading,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        check=True,
        timeout=20,
    )
    os.close(reading)
    return writing


def dismiss_reaper(descriptor: int) -> None:
    os.write(descriptor, b"done")
    os.close(descriptor)
