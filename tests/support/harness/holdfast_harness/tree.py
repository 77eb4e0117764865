"""Everything that can be seen of a tree, and how two trees differ."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    kind: str
    mode: int
    uid: int
    gid: int
    size: int  # 0 for directories: file systems count them differently
    mtime_ns: int
    rdev: int
    target: str  # of a symlink
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...]  # all names of this object, for files with more than one
    nlink: int  # 0 for directories, as above
    sha256: str


Tree = dict[str, Entry]

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def _walk(root: Path) -> dict[str, os.stat_result]:
    """path relative to root ("." is the root) -> lstat. Every readdir error is raised."""
    found = {".": os.lstat(root)}
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                info = os.lstat(root / path)
                found[path] = info
                if entry.is_dir(follow_symlinks=False) != stat.S_ISDIR(info.st_mode):
                    raise AssertionError(f"{path}: readdir and lstat name different types")
                if stat.S_ISDIR(info.st_mode):
                    pending.append(path)
    return found


def read_tree(root: Path, threads: int = 4) -> Tree:
    """Reads every name, attribute and byte below `root`."""
    found = _walk(root)
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path, info in found.items():
        if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
            names[info.st_dev, info.st_ino].append(path)

    def entry(path: str) -> Entry:
        info, full = found[path], str(root / path)
        kind = _KINDS[stat.S_IFMT(info.st_mode)]
        is_dir = kind == "dir"
        return Entry(
            kind=kind,
            mode=stat.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            size=0 if is_dir else info.st_size,
            mtime_ns=info.st_mtime_ns,
            rdev=info.st_rdev if kind in ("char", "block") else 0,
            target=os.readlink(full) if kind == "symlink" else "",
            xattrs=_xattrs(full),
            links=tuple(sorted(names.get((info.st_dev, info.st_ino), ()))) if not is_dir else (),
            nlink=0 if is_dir else info.st_nlink,
            sha256=_sha256(full) if kind == "file" else "",
        )

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(found, pool.map(entry, found)))


def _same_time(expected_ns: int, seen_ns: int) -> bool:
    """eStargz stores whole seconds, rounded: the only loss the format forces."""
    rounded = (expected_ns + 500_000_000) // 1_000_000_000 * 1_000_000_000
    return seen_ns in (expected_ns, rounded)


def differences(expected: Tree, seen: Tree, untimed: frozenset[str] = frozenset()) -> list[str]:
    """Every difference in a line of words. The mtimes of the directories in `untimed` are not compared."""
    found = [f"{path!r}: missing" for path in expected.keys() - seen.keys()]
    found += [f"{path!r}: must not be there ({seen[path].kind})" for path in seen.keys() - expected.keys()]
    for path in expected.keys() & seen.keys():
        left, right = asdict(expected[path]), asdict(seen[path])
        if path in untimed or _same_time(left["mtime_ns"], right["mtime_ns"]):
            left.pop("mtime_ns"), right.pop("mtime_ns")
        for what, value in left.items():
            if value != right[what]:
                found.append(f"{path!r}: {what} is {right[what]!r}, must be {value!r}")
    return sorted(found)
