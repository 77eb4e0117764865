"""Images for load tests and benchmarks of the handover, from a fixed seed, kept in the cache folder as a registry's store.

Each image's busy layers hold small files, to be read at first, and cold ones of more than 64 KiB, so that a read brings nothing
but the file itself: content that nobody has read lasts for every round. They may hold programs as well, each with content of its
own, so that its first run reads what nobody has read. Idle layers hold three tiny files: they are mounts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from . import images
from .containerd import Containerd
from .instance import Instance
from .oci_layout import Layout, chain_id
from .process import run
from .registry import get_json

BLOCK = 65536  # of holdfast-reader's manifests
COLD_BYTES = 72 * 1024
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Shape:
    images: int
    layers: tuple[int, ...]  # of each image, taken in turn
    busy_layers: int  # of each image, the topmost ones
    warm_files: int  # of a busy layer
    cold_files: int
    programs: int = 0


SEVENTY = Shape(images=12, layers=(6,) * 10 + (5,) * 2, busy_layers=6, warm_files=30, cold_files=60)


def many(mounts: int, busy: int) -> Shape:
    """`mounts` layers in `busy` images, the topmost layer of each image is the busy one."""
    each, rest = divmod(mounts, busy)
    return Shape(busy, (each + 1,) * rest + (each,) * (busy - rest), 1, 10, max(40, 1200 // busy))


@dataclasses.dataclass(frozen=True)
class FleetImage:
    name: str
    chain_id: str
    warm: Path  # manifests
    cold: Path
    programs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fleet:
    store: Path
    images: list[FleetImage]
    layers: int
    busy_everywhere: bool  # no layer is idle


def _line(path: str, content: bytes) -> str:
    digests = []
    for start in range(0, len(content), BLOCK):
        first = hashlib.sha256(content[start : start + BLOCK]).digest()[:8]
        digests.append(f"{int.from_bytes(first, 'little'):016x}")
    return f"{len(content)} {','.join(digests)} {path}"


def _layer(
    seed: str, index: int, warm: int, cold: int, programs: int, lines: dict[str, list[str]]
) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        rng = random.Random(f"{seed}/{index}")

        def folder(name: str) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)

        def file(name: str, size: int, begin: bytes = b"", mode: int = 0o644) -> str:
            content = begin + rng.randbytes(size)  # noise: so its size in the blob is known
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
            return _line(name, content)

        folder(f"layer{index}")
        for number in range(warm or 3):
            made = file(f"layer{index}/file{number}", rng.randrange(2_000, 60_000) if warm else rng.randrange(200, 900))
            if warm:
                lines["warm"].append(made)
        for number in range(cold):
            if number % 20 == 0:
                folder(f"layer{index}/cold{number // 20}")
            lines["cold"].append(file(f"layer{index}/cold{number // 20}/file{number}", COLD_BYTES))
        for number in range(programs):
            # This machine's own, which ends with 0; what follows it makes each of them another file.
            file(f"layer{index}/program{number}", COLD_BYTES, Path("/bin/true").read_bytes(), 0o755)
            lines["programs"].append(f"layer{index}/program{number}")

    return write


def _make_image(box: Instance, containerd: Containerd, address: str, name: str, number: int, shape: Shape, folder: Path) -> str:
    """Into the registry, converted; its chain id."""
    layers = shape.layers[number % len(shape.layers)]
    lines: dict[str, list[str]] = {"warm": [], "cold": [], "programs": []}
    layout = Layout(box.root / name)
    for index in range(layers):
        busy = index >= layers - shape.busy_layers
        sizes = (shape.warm_files, shape.cold_files, shape.programs) if busy else (0, 0, 0)
        layout.add_layer(_layer(name, index, *sizes, lines), level=1)
    layout.finish([], ["/none"])
    for kind, rows in lines.items():
        (folder / f"{name}.{kind}").write_text("\n".join(rows) + "\n")
    original, converted = (f"{address}/{name}:{tag}" for tag in ("gzip", "esgz"))
    copy = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
    run([*copy, f"oci:{layout.folder}:latest", f"docker://{original}"], timeout=300)
    containerd.ctr("content", "fetch", "--plain-http", original, timeout=300)
    convert = ("images", "convert", "--estargz", "--estargz-compression-level", "1", "--oci", original, converted)
    containerd.ctr(*convert, remote=True, timeout=900)
    containerd.ctr("images", "push", "--plain-http", converted, timeout=300)
    containerd.ctr("images", "rm", original, converted)
    shutil.rmtree(layout.folder)
    manifest = get_json(address, f"{name}/manifests/esgz")
    config = get_json(address, f"{name}/blobs/{manifest['config']['digest']}")
    return chain_id(config["rootfs"]["diff_ids"])


def _make(shape: Shape, folder: Path, say: Say) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "store").mkdir(parents=True)
    chains = {}
    with Instance("fleet") as box:
        registry = box.registry(store=partial / "store")
        containerd = box.containerd()
        for number in range(shape.images):
            name = f"busy{number:02}"
            say(f"making image {name} ({number + 1} of {shape.images}, kept for later runs)")
            chains[name] = _make_image(box, containerd, registry.address, name, number, shape, partial)
    (partial / "fleet.json").write_text(json.dumps(chains))
    partial.rename(folder)


def ensure(shape: Shape, say: Say = images.quiet) -> Fleet:
    """Made now if the cache does not hold it. Safe to call in parallel."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + repr(shape).encode()).hexdigest()[:12]
    base = images.cache_folder() / "images"
    folder = base / f"fleet-{recipe}"
    with images.locked(base / f"fleet-{recipe}.lock"):
        if not folder.exists():
            _make(shape, folder, say)
    chains = json.loads((folder / "fleet.json").read_text())
    found = [
        FleetImage(
            name,
            chain,
            folder / f"{name}.warm",
            folder / f"{name}.cold",
            tuple((folder / f"{name}.programs").read_text().split()),
        )
        for name, chain in chains.items()
    ]
    layers = sum(shape.layers[number % len(shape.layers)] for number in range(shape.images))
    return Fleet(folder / "store", found, layers, shape.busy_layers >= max(shape.layers))
