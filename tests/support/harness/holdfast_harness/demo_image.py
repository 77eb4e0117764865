"""The demo image: a Debian userland with python3 and a small search application, in four layers.

1 debootstrap's minbase; 2 python3, by apt; 3 an application with data derived from what is in the image: an archive of
Python's library, a full-text database of it, a database of all packages' files; 4 changes of configuration, the
documentation deleted (whiteouts) and a folder replaced (an opaque directory). Nothing is padding.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import stat
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import HarnessError
from .oci_layout import Layout
from .process import run

ENVIRONMENT = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
Say = Callable[[str], None]
Key = tuple[int, int, int, int, int, int, str]
_MACHINES_OWN = {"etc/resolv.conf", "etc/hostname"}  # debootstrap copies them from the building machine

_BUILD_DATA = """
import os, sqlite3, zipfile
app = "/srv/app"
os.makedirs(app + "/data"); os.makedirs(app + "/cache")
sources = sorted(os.path.join(folder, name) for folder, _, names in os.walk("/usr/lib/python3.11")
                 for name in names if name.endswith(".py"))
with zipfile.ZipFile(app + "/data/library.zip", "w", zipfile.ZIP_STORED) as archive:
    for path in sources:
        archive.write(path)
with sqlite3.connect(app + "/data/search.db") as db:
    db.execute("create virtual table text using fts5(path, body)")
    for path in sources:
        db.execute("insert into text values (?, ?)", (path, open(path, errors="replace").read()))
with sqlite3.connect(app + "/data/packages.db") as db:
    db.execute("create table files (package text, path text)")
    for name in sorted(os.listdir("/var/lib/dpkg/info")):
        if name.endswith(".list"):
            for line in open("/var/lib/dpkg/info/" + name):
                db.execute("insert into files values (?, ?)", (name[:-5], line.strip()))
    db.execute("create index by_path on files (path)")
open(app + "/cache/first-query", "w").write("import")
open(app + "/search.py", "w").write('''import sqlite3, sys
db = sqlite3.connect("file:/srv/app/data/search.db?mode=ro&immutable=1", uri=True)
for (path,) in db.execute("select path from text where body match ? order by path", (sys.argv[1],)):
    print(path)
''')
"""


@dataclass(frozen=True)
class Mirror:
    uri: str
    suite: str
    keyring: str | None


def _codename() -> str:
    text = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)", text, re.MULTILINE)
    return found.group(1) if found else "bookworm"


def _one_line_sources(text: str) -> list[tuple[str, str, str, str | None]]:
    found = []
    for line in text.splitlines():
        matched = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line.strip())
        if matched:
            keyring = re.search(r"signed-by=(\S+)", matched[1] or "")
            found.append((matched[2], matched[3], matched[4], keyring[1] if keyring else None))
    return found


def _deb822_sources(text: str) -> list[tuple[str, str, str, str | None]]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if line and not line.startswith("#") and ":" in line]
        fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        keyring = fields.get("signed-by", "")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                known = keyring if keyring.startswith("/") else None
                found.append((uri, suite, fields.get("components", ""), known))
    return found


def machine_mirror() -> Mirror:
    """The Debian mirror that this machine's apt uses."""
    codename = _codename()
    folder = Path("/etc/apt/sources.list.d")
    entries = []
    for path in [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]:
        if path.exists():
            entries += _one_line_sources(path.read_text())
    for path in sorted(folder.glob("*.sources")):
        entries += _deb822_sources(path.read_text())
    for uri, suite, components, keyring in entries:
        if suite == codename and "main" in components.split() and uri.startswith(("http://", "https://", "file:")):
            return Mirror(uri, suite, keyring)
    raise HarnessError(f"no Debian mirror for {codename}: /etc/apt/sources.list names none with component main")


def _proxy_environment() -> dict[str, str]:
    """apt's proxy, for debootstrap's downloads."""
    answer = run(["apt-config", "shell", "http_proxy", "Acquire::http::Proxy"], check=False).stdout
    found = re.match(r"http_proxy='?([^'\n]+)", answer)
    return {"http_proxy": found[1]} if found else {}


def _index(root: Path) -> dict[str, Key]:
    """path -> what tells whether it changed."""
    found: dict[str, Key] = {}
    for folder, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(folder, name)
            if os.path.relpath(path, root) in _MACHINES_OWN:
                continue
            info = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else ""
            content = (info.st_size, info.st_mtime_ns) if not stat.S_ISDIR(info.st_mode) else (0, info.st_mtime_ns)
            key = (info.st_mode, info.st_uid, info.st_gid, *content, info.st_rdev, target)
            found[os.path.relpath(path, root)] = key
    return found


def add_path(tar: tarfile.TarFile, root: Path, path: str) -> None:
    """One entry with its xattrs; times in whole seconds, as image builders write them."""
    full = root / path
    entry = tar.gettarinfo(str(full), arcname=path)
    entry.uname = entry.gname = ""
    entry.mtime = int(os.lstat(full).st_mtime)
    for name in os.listxattr(full, follow_symlinks=False):
        value = os.getxattr(full, name, follow_symlinks=False)
        entry.pax_headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    if entry.isreg():
        with full.open("rb") as content:
            tar.addfile(entry, content)
    else:
        tar.addfile(entry)


def _add_difference(layout: Layout, root: Path, before: dict[str, Key]) -> dict[str, Key]:
    after = _index(root)

    def write(tar: tarfile.TarFile) -> None:
        for path in sorted(after):
            if after[path] != before.get(path) and not stat.S_ISSOCK(after[path][0]):
                add_path(tar, root, path)
        for path in sorted(before):
            parent = os.path.dirname(path)
            if path not in after and (parent == "" or parent in after):
                tar.addfile(tarfile.TarInfo(os.path.join(parent, ".wh." + os.path.basename(path))))

    layout.add_layer(write)
    return after


def _add_config_layer(layout: Layout, root: Path) -> None:
    """Written by hand, to hold the kinds of change that a difference of trees does not: an opaque directory."""
    documentation = sorted(path.name for path in (root / "usr/share/doc").iterdir() if path.name.startswith("lib"))

    def write(tar: tarfile.TarFile) -> None:
        def folder(path: str) -> None:
            tar.addfile(_timed(tarfile.TarInfo(path), tarfile.DIRTYPE, 0o755))

        def text(path: str, content: str) -> None:
            entry = _timed(tarfile.TarInfo(path), tarfile.REGTYPE, 0o644)
            entry.size = len(content.encode())
            tar.addfile(entry, io.BytesIO(content.encode()))

        folder("etc")
        text("etc/motd", "Welcome to the demo image.\n")
        text("etc/search.conf", "database = /srv/app/data/search.db\n")
        folder("srv")
        folder("srv/app")
        folder("srv/app/cache")
        tar.addfile(_timed(tarfile.TarInfo("srv/app/cache/.wh..wh..opq"), tarfile.REGTYPE, 0o644))
        text("srv/app/cache/warm", "import\nclass\n")
        folder("usr")
        folder("usr/share")
        folder("usr/share/doc")
        for name in documentation:
            tar.addfile(_timed(tarfile.TarInfo(f"usr/share/doc/.wh.{name}"), tarfile.REGTYPE, 0o644))

    layout.add_layer(write)


def _timed(entry: tarfile.TarInfo, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry.type, entry.mode, entry.mtime = kind, mode, 1_700_000_000
    return entry


def _isolated(command: list[str], log: Path, what: str, timeout: float) -> None:
    """In a mount namespace of its own: what it mounts in the chroot vanishes with it, however it ends."""
    env = {**_proxy_environment(), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    env["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        run(["unshare", "--mount", *command], timeout=timeout, env=env, log=log)
    except HarnessError as error:
        raise HarnessError(f"{what} failed (is there network for apt?): {error}") from None


def make(layout_folder: Path, work: Path, say: Say) -> None:
    """Writes the image as an OCI layout. Takes about two minutes and needs the machine's apt mirror."""
    mirror = machine_mirror()
    root, log = work / "rootfs", work / "debootstrap.log"
    say(f"debootstrap {mirror.suite} from the machine's apt mirror")
    keyring = [f"--keyring={mirror.keyring}"] if mirror.keyring else []
    command = ["debootstrap", "--variant=minbase", *keyring, mirror.suite, str(root), mirror.uri]
    _isolated(command, log, "debootstrap", timeout=900)
    _drop_package_cache(root)
    layout = Layout(layout_folder)
    state = _add_difference(layout, root, {})
    say("python3 by apt")
    install = "mount -t proc proc /proc && apt-get update -q && apt-get install -y -q --no-install-recommends python3"
    _isolated(["chroot", str(root), "sh", "-c", install], log, "apt-get install python3", timeout=900)
    _drop_package_cache(root)
    state = _add_difference(layout, root, state)
    say("the application's data")
    build = f"PYTHONDONTWRITEBYTECODE=1 python3 -c {shlex.quote(_BUILD_DATA)}"
    _isolated(["chroot", str(root), "sh", "-c", build], log, "building the application's data", timeout=600)
    _add_difference(layout, root, state)
    _add_config_layer(layout, root)
    layout.finish(ENVIRONMENT, ["python3", "/srv/app/search.py", "import"])


def _drop_package_cache(root: Path) -> None:
    """What an image builder removes: downloaded packages, lists, logs."""
    for pattern in ("var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/log/*.log", "var/log/apt/*"):
        for path in root.glob(pattern):
            path.unlink()
    subprocess.run(["find", str(root / "var/lib/apt/lists"), "-type", "f", "-delete"], check=True, timeout=60)
