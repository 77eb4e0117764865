"""An image that holds every kind of object a layer can: the second subject of the content oracle.

Only what eStargz cannot express is left out: names that are not UTF-8.
"""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .oci_layout import Layout

_TIME = 1_650_000_000
_SPARSE_SIZE = 256 << 20
_CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"  # cap_net_raw=ep


class _Zeros(io.RawIOBase):
    """A file of zeros that needs no memory, with a word at its start, middle and end."""

    def __init__(self, size: int):
        self._left = size
        self._size = size

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        count = self._left if count < 0 else min(count, self._left)
        block = bytearray(count)
        start = self._size - self._left
        for mark in (0, self._size // 2, self._size - 4):
            if start <= mark and mark + 4 <= start + count:
                block[mark - start : mark - start + 4] = b"mark"
        self._left -= count
        return bytes(block)


@dataclass
class _Writer:
    """Short words for tar entries."""

    tar: tarfile.TarFile
    random: random.Random = field(default_factory=lambda: random.Random(4711))

    def add(self, name: str, kind: bytes, mode: int = 0o644, content: IO[bytes] | None = None, **more: object) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.mtime = kind, mode, _TIME
        xattrs = more.pop("xattrs", {})
        assert isinstance(xattrs, dict)
        for key, value in xattrs.items():
            entry.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
        for key, value in more.items():
            setattr(entry, key, value)
        self.tar.addfile(entry, content)

    def file(self, name: str, content: bytes = b"", mode: int = 0o644, **more: object) -> None:
        self.add(name, tarfile.REGTYPE, mode, io.BytesIO(content), size=len(content), **more)

    def folder(self, name: str, mode: int = 0o755, **more: object) -> None:
        self.add(name, tarfile.DIRTYPE, mode, **more)

    def link(self, name: str, target: str, **more: object) -> None:
        self.add(name, tarfile.SYMTYPE, 0o777, linkname=target, **more)

    def hard(self, name: str, target: str, mode: int = 0o644) -> None:
        """With the attributes of its target, as every tar writer has it: an unpack applies them to the shared inode."""
        self.add(name, tarfile.LNKTYPE, mode, linkname=target)

    def noise(self, size: int) -> bytes:
        return self.random.randbytes(size)


def _kinds(w: _Writer) -> None:
    w.folder("kinds")
    w.file("kinds/empty")
    w.file("kinds/one-byte", b"x")
    w.file("kinds/text", b"hello\n" * 100)
    w.file("kinds/noise-5M", w.noise(5 << 20))  # more than one chunk of 4 MiB
    w.file("kinds/exactly-4M", w.noise(4 << 20))
    w.add("kinds/sparse", tarfile.REGTYPE, content=_Zeros(_SPARSE_SIZE), size=_SPARSE_SIZE)  # type: ignore[arg-type]
    w.link("kinds/relative-link", "text")
    w.link("kinds/absolute-link", "/kinds/one-byte")
    w.link("kinds/dangling-link", "nowhere/at all")
    w.link("kinds/long-link", "./" * 1000 + "text")
    w.add("kinds/char", tarfile.CHRTYPE, 0o666, devmajor=1, devminor=3)
    w.add("kinds/char-large", tarfile.CHRTYPE, 0o600, devmajor=255, devminor=70000)
    w.add("kinds/block", tarfile.BLKTYPE, 0o660, devmajor=7, devminor=200)
    w.add("kinds/fifo", tarfile.FIFOTYPE, 0o622)
    w.file("kinds/hard-a", b"three names")
    w.hard("kinds/hard-b", "kinds/hard-a")
    w.folder("kinds/elsewhere")
    w.hard("kinds/elsewhere/hard-c", "kinds/hard-b")  # a link to a link
    w.hard("kinds/hard-empty", "kinds/empty")
    w.hard("kinds/hard-fifo", "kinds/fifo", 0o622)


def _modes_and_owners(w: _Writer) -> None:
    w.folder("modes")
    for mode in (0o000, 0o400, 0o111, 0o777, 0o4755, 0o2755, 0o1777, 0o6711, 0o7777):
        w.file(f"modes/file-{mode:04o}", b"mode", mode)
        w.folder(f"modes/dir-{mode:04o}", mode)
    w.folder("owners")
    for uid, gid in ((1, 2), (65534, 65534), (3_000_000, 4_000_000), (2_147_483_647, 4_294_967_294)):
        w.file(f"owners/{uid}-{gid}", b"owner", uid=uid, gid=gid, uname="somebody", gname="group")
    w.link("owners/link", "1-2", uid=77, gid=78)


def _times(w: _Writer) -> None:
    w.folder("times")
    for name, when in (("epoch", 0), ("one", 1), ("before", -86400), ("y2038", 2**31 + 5), ("y2300", 10_413_792_000)):
        w.file(f"times/{name}", b"t", mtime=when)
    w.file("times/nanoseconds", b"t", mtime=1_600_000_000.123456)
    w.file("times/nanoseconds-up", b"t", mtime=1_600_000_000.987654)
    w.folder("times/old-dir", mtime=42)
    w.link("times/old-link", "epoch", mtime=43)


def _xattrs(w: _Writer) -> None:
    w.folder("xattrs", xattrs={"user.of-dir": b"d"})
    w.file("xattrs/user", b"x", xattrs={"user.a": b"1", "user.b": b"two", "user.empty": b""})
    w.file("xattrs/large", b"x", xattrs={"user.large": b"v" * 2000})
    w.file("xattrs/capability", b"x", 0o755, xattrs={"security.capability": _CAPABILITY})
    w.file("xattrs/trusted", b"x", xattrs={"trusted.secret": b"s"})


def _names(w: _Writer) -> None:
    w.folder("names")
    for name in (" leading", "trailing ", "in the middle", "new\nline", "tab\t", "ümläut", "日本語", "back\\slash", '"quoted"',
                 "*?[]", "-dash", "..dots..", "a" * 255, "é" * 127):
        w.file(f"names/{name}", name.encode())
    w.folder("./names/dotted")
    w.file("./names/dotted/file", b"./")
    w.file("/names/absolute", b"/")
    w.folder("names/slashed/")
    w.file("names//doubled", b"//")
    deep = "names/deep"
    w.folder(deep)
    for level in range(60):
        deep += f"/level-{level:02d}-of-a-long-way"
        w.folder(deep)
    w.file(f"{deep}/bottom", b"bottom")


def _crowd(w: _Writer) -> None:
    """A directory whose listing needs many calls."""
    w.folder("crowd")
    for number in range(1500):
        w.file(f"crowd/entry-{number:05d}-with-a-name-of-some-length", b"%d" % number)


def _base(tar: tarfile.TarFile) -> None:
    w = _Writer(tar)
    w.folder("./", 0o755)
    for part in (_kinds, _modes_and_owners, _times, _xattrs, _names, _crowd):
        part(w)
    w.folder("changes")
    for name in ("file-to-dir", "file-to-link", "deleted", "overwritten", "metadata-only", "hard-below"):
        w.file(f"changes/{name}", b"lower " + name.encode())
    w.link("changes/link-to-file", "nowhere")
    for name in ("dir-to-file", "opaque", "opaque-late", "deleted-dir", "recreated", "kept"):
        w.folder(f"changes/{name}", 0o750, uid=5, gid=6)
        w.file(f"changes/{name}/lower", b"lower")
        w.folder(f"changes/{name}/sub")
        w.file(f"changes/{name}/sub/lower", b"lower")
    w.file("changes/twice", b"first")  # the same name twice in one tar: the later one counts
    w.file("changes/twice", b"second, longer")


def _implied_directories(tar: tarfile.TarFile) -> None:
    """Directories that the next layer only implies must keep what they have here."""
    w = _Writer(tar)
    w.folder("implied", 0o700, uid=1, gid=1, mtime=_TIME - 1, xattrs={"user.kept": b"yes"})
    w.folder("implied/inner", 0o2710, uid=2, gid=3)
    w.folder("implied/sticky", 0o1777)


def _upper(tar: tarfile.TarFile) -> None:
    w = _Writer(tar)
    w.file("implied/file", b"no entry for implied/ here")
    w.file("implied/inner/file", b"nor for implied/inner/")
    w.file("implied/sticky/.wh.absent")
    w.file("nothing-below/inner/file", b"implied with nothing below")
    w.folder("changes")
    w.folder("changes/file-to-dir", 0o711)
    w.file("changes/file-to-dir/new", b"new")
    w.link("changes/file-to-link", "overwritten")
    w.file("changes/link-to-file", b"a file now")
    w.file("changes/dir-to-file", b"a file now")
    w.file("changes/.wh.deleted")
    w.file("changes/.wh.deleted-dir")
    w.file("changes/overwritten", b"upper", 0o600, uid=9)
    w.file("changes/metadata-only", b"lower metadata-only", 0o4711)
    w.folder("changes/opaque", 0o755)
    w.file("changes/opaque/.wh..wh..opq")
    w.file("changes/opaque/upper", b"upper")
    w.folder("changes/opaque-late", 0o755)
    w.file("changes/opaque-late/upper", b"upper")
    w.file("changes/opaque-late/.wh..wh..opq")  # after the entries it must not hide
    w.file("changes/.wh.recreated")
    w.folder("changes/recreated", 0o701)
    w.file("changes/recreated/upper", b"upper")
    w.folder("changes/kept")
    w.file("changes/kept/sub/.wh.lower")
    w.file("changes/hard-new", b"linked in this layer")
    w.hard("changes/hard-again", "changes/hard-new")
    w.folder("times/old-dir", mtime=44)


def _topmost(tar: tarfile.TarFile) -> None:
    """What was deleted comes back; what was implied is implied once more."""
    w = _Writer(tar)
    w.file("changes/deleted", b"back again")
    w.file("changes/opaque/top", b"top")
    w.file("implied/inner/top", b"top")


def make(layout_folder: Path) -> None:
    layout = Layout(layout_folder)
    for write in (_base, _implied_directories, _upper, _topmost):
        layout.add_layer(write)
    layout.finish(["PATH=/bin"], ["/bin/true"])
