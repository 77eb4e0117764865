"""Mounts below a folder: listing, unmounting and, for FUSE, aborting. Never touches a path below a mount point: a FUSE
mount whose server is dead would hold the caller for ever."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_FUSECTL = Path("/sys/fs/fuse/connections")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    point: str
    kind: str
    minor: int


def _unescape(word: str) -> str:
    return word.encode().decode("unicode_escape") if "\\" in word else word


def mounts_below(folder: Path) -> list[Mount]:
    """Mounts at or below `folder` in this mount namespace, in the order they were made."""
    prefix = str(folder)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        point = _unescape(fields[4])
        if point == prefix or point.startswith(prefix + "/"):
            found.append(Mount(point, right.split()[0], int(fields[2].split(":")[1])))
    return found


def fuse_mounts_below(folder: Path) -> list[Mount]:
    return [mount for mount in mounts_below(folder) if mount.kind.startswith("fuse")]


def mount_fusectl() -> None:
    """Makes /sys/fs/fuse/connections available: without it a reader stuck in a dead mount cannot be freed."""
    if not any(_FUSECTL.glob("*")) and not os.path.ismount(_FUSECTL) and _FUSECTL.is_dir():
        subprocess.run(["mount", "-t", "fusectl", "none", str(_FUSECTL)], check=False, capture_output=True)


def abort_fuse_below(folder: Path) -> None:
    """Aborts the connections of the FUSE mounts below `folder`: everything that waits in them gets an error."""
    for mount in fuse_mounts_below(folder):
        try:
            (_FUSECTL / str(mount.minor) / "abort").write_text("1")
        except OSError:
            pass


def unmount(point: str) -> bool:
    """Lazy unmount that neither follows nor opens anything."""
    return _libc.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0


def unmount_below(folder: Path) -> list[Mount]:
    """Unmounts all, the latest first, several times over for stacked mounts; what could not be unmounted."""
    for _ in range(5):
        left = mounts_below(folder)
        if not left:
            return []
        for mount in reversed(left):
            unmount(mount.point)
    return mounts_below(folder)
