"""Twelve images of seventy layers for benchmarks of restart and handover: made from a fixed seed, kept in the cache folder
as a registry's store, each with a manifest for holdfast-reader."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
from holdfast_harness import images  # noqa: E402
from holdfast_harness.images import Variant  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.oci_layout import Layout  # noqa: E402

IMAGES, LAYERS = 12, 70
_BLOCK = 65536  # of holdfast-reader's manifests
_WORDS = [b"container", b"layer", b"snapshot", b"request", b"ledger", b"worker", b"digest", b"chunk", b"mount", b"range"]


@dataclasses.dataclass(frozen=True)
class FleetImage:
    name: str
    esgz: Variant
    manifest: Path  # of the whole tree


@dataclasses.dataclass(frozen=True)
class Fleet:
    store: Path
    images: list[FleetImage]


def _content(rng: random.Random, size: int) -> bytes:
    """Half words, half noise: compresses to about two thirds, as binaries do."""
    text = b" ".join(rng.choice(_WORDS) for _ in range(size // 14 + 1))
    text = text[: size // 2]
    return text + rng.randbytes(size - len(text))


def _manifest_line(path: str, content: bytes) -> str:
    digests = []
    for start in range(0, len(content), _BLOCK):
        first = hashlib.sha256(content[start : start + _BLOCK]).digest()[:8]
        digests.append(f"{int.from_bytes(first, 'little'):016x}")
    return f"{len(content)} {','.join(digests) or '-'} {path}"


def _layer(name: str, index: int, lines: list[str]) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        rng = random.Random(f"{name}/{index}")
        folder = tarfile.TarInfo(f"layer{index}")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        sizes = [rng.randrange(2_000, 60_000) for _ in range(30)] + [1_500_000, 1_500_000]
        for number, size in enumerate(sizes):
            content = _content(rng, size)
            entry = tarfile.TarInfo(f"layer{index}/file{number}")
            entry.size, entry.mode = size, 0o644
            tar.addfile(entry, io.BytesIO(content))
            lines.append(_manifest_line(entry.name, content))

    return write


def _make_image(name: str, layers: int, folder: Path) -> dict[str, object]:
    lines: list[str] = []
    with Instance("fleet") as box:
        layout = Layout(box.root / "layout")
        for index in range(layers):
            layout.add_layer(_layer(name, index, lines), level=1)
        layout.finish([], ["/none"])
        (folder / f"{name}.manifest").write_text("\n".join(lines) + "\n")
        return images._push_and_convert(box, box.root / "layout", name, folder / "store", images.quiet)


def ensure(say: Callable[[str], None]) -> Fleet:
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    base = images.cache_folder() / "images"
    folder = base / f"fleet-{recipe}"
    if not folder.exists():
        base.mkdir(parents=True, exist_ok=True)
        partial = base / f"fleet-{recipe}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "store").mkdir(parents=True)
        described = {}
        for number in range(IMAGES):
            name, layers = f"fleet{number:02}", 6 if number < LAYERS - 5 * IMAGES else 5
            say(f"making image {name} of {layers} layers (kept for later runs)")
            described[name] = _make_image(name, layers, partial)
        (partial / "fleet.json").write_text(json.dumps(described))
        partial.rename(folder)
    described = json.loads((folder / "fleet.json").read_text())
    found = [FleetImage(n, Variant(**d["esgz"]), folder / f"{n}.manifest") for n, d in described.items()]
    return Fleet(folder / "store", found)
