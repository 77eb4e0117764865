"""The test images, made once and kept in a cache folder (.cache/ of the repository, or $HOLDFAST_CACHE).

Each lies there as the store of a docker-registry with the repository `<name>` and two tags: `gzip`, as made, and `esgz`,
converted by ctr-remote. Beside it, image.json (class Image). Any number of registries may serve it read-only.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import demo_image, every_object_image
from .holdfast import source_folder
from .instance import Instance
from .oci_layout import chain_id
from .process import run
from .registry import Registry, get_json

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """A `Say` for those who do not care."""


@dataclasses.dataclass(frozen=True)
class Variant:
    chain_id: str  # of the topmost layer: the name of its snapshot in containerd
    layers: list[str]  # digests
    bytes: int  # of all compressed layers


@dataclasses.dataclass(frozen=True)
class Image:
    name: str
    store: Path
    gzip: Variant
    esgz: Variant

    def reference(self, address: str, tag: str) -> str:
        return f"{address}/{self.name}:{tag}"


def cache_folder() -> Path:
    return Path(os.environ.get("HOLDFAST_CACHE") or source_folder() / ".cache")


def _recipe(name: str) -> str:
    """Changes with whatever makes the image."""
    here = Path(__file__).parent
    files = ("oci_layout.py", f"{name.replace('-', '_')}_image.py")
    return hashlib.sha256(b"".join((here / file).read_bytes() for file in files)).hexdigest()[:12]


def _variant(address: str, name: str, tag: str) -> Variant:
    manifest = get_json(address, f"{name}/manifests/{tag}")
    config = get_json(address, f"{name}/blobs/{manifest['config']['digest']}")
    return Variant(
        chain_id=chain_id(config["rootfs"]["diff_ids"]),
        layers=[layer["digest"] for layer in manifest["layers"]],
        bytes=sum(layer["size"] for layer in manifest["layers"]),
    )


def _push_and_convert(box: Instance, layout: Path, name: str, store: Path, say: Say) -> dict[str, Any]:
    registry = Registry(box, store=store)
    containerd = box.containerd()
    original, converted = (f"{registry.address}/{name}:{tag}" for tag in ("gzip", "esgz"))
    say("push it to the loopback registry")
    run(
        ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{original}"],
        timeout=300,
    )
    say("convert it with ctr-remote images convert --estargz --oci, push the result")
    containerd.ctr("content", "fetch", "--plain-http", original, timeout=300)
    containerd.ctr("images", "convert", "--estargz", "--oci", original, converted, remote=True, timeout=900)
    containerd.ctr("images", "push", "--plain-http", converted, timeout=300)
    variants = {tag: dataclasses.asdict(_variant(registry.address, name, tag)) for tag in ("gzip", "esgz")}
    registry.stop()
    return variants


def _make(name: str, folder: Path, say: Say) -> None:
    with Instance("image") as box:
        layout, store = box.root / "layout", box.root / "store"
        store.mkdir()
        if name == "demo":
            demo_image.make(layout, box.root, say)
        else:
            every_object_image.make(layout)
        described = _push_and_convert(box, layout, name, store, say)
        (box.root / "image.json").write_text(json.dumps(described, indent=2))
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.move(str(store), partial / "store")
        shutil.move(str(box.root / "image.json"), partial / "image.json")
        partial.rename(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(name: str, say: Say = quiet) -> Image:
    """The image "demo" or "every-object", made now if the cache does not hold it. Safe to call in parallel."""
    base = cache_folder() / "images"
    folder = base / f"{name}-{_recipe(name)}"
    with locked(base / f"{name}.lock"):
        if folder.exists():
            say(f"image {name} is in the cache ({folder})")
        else:
            for old in base.glob(f"{name}-????????????"):
                shutil.rmtree(old, ignore_errors=True)
            _make(name, folder, say)
    described = json.loads((folder / "image.json").read_text())
    return Image(name, folder / "store", Variant(**described["gzip"]), Variant(**described["esgz"]))
