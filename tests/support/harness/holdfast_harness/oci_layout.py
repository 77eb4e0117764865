"""Writes OCI image layouts (image-spec 1.0) from layer tars made here: full control over every header of a layer."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

LayerWriter = Callable[[tarfile.TarFile], None]


class _Hashing(io.RawIOBase):
    """Passes on what is written and hashes it."""

    def __init__(self, target: IO[bytes]):
        self._target = target
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self._target.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


class Layout:
    """An OCI layout folder with one image."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        self._layers: list[dict[str, Any]] = []
        self._diff_ids: list[str] = []

    def _blob(self, content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self._blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def add_layer(self, write: LayerWriter, level: int = 6) -> None:
        """`write` fills the tar; it is stored as a gzip layer."""
        partial = self.folder / "layer.partial"
        with partial.open("wb") as file:
            outer = _Hashing(file)
            with gzip.GzipFile(fileobj=outer, mode="wb", compresslevel=level, mtime=0) as zipped:
                inner = _Hashing(zipped)  # type: ignore[arg-type]
                with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                    write(tar)
        partial.rename(self._blobs / outer.sha256.hexdigest())
        self._layers.append(
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": f"sha256:{outer.sha256.hexdigest()}",
                "size": outer.size,
            }
        )
        self._diff_ids.append(f"sha256:{inner.sha256.hexdigest()}")

    def finish(self, environment: list[str], command: list[str]) -> None:
        """Writes config, manifest and index (tag `latest`)."""
        machine = platform.machine()
        config = {
            "architecture": _GO_ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Env": environment, "Cmd": command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": self._diff_ids},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self._blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": self._layers,
        }
        entry = self._blob(json.dumps(manifest).encode(), manifest["mediaType"])
        entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
        entry["platform"] = {"architecture": config["architecture"], "os": "linux"}
        index = {"schemaVersion": 2, "manifests": [entry]}
        (self.folder / "index.json").write_text(json.dumps(index))
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def chain_id(diff_ids: list[str]) -> str:
    """The name containerd gives the snapshot of these layers (image-spec, config.md)."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


def implied_directories(layers: list[Path]) -> set[str]:
    """Directories whose topmost layer only implies them: by an entry below, or by a whiteout.

    An ordinary unpack gives them the time of unpacking, since it creates something in them.
    """
    implied: set[str] = set()
    for layer in layers:
        explicit: set[str] = set()
        parents: set[str] = set()
        with tarfile.open(layer, "r:gz") as tar:
            for entry in tar:
                path = "/".join(part for part in entry.name.split("/") if part not in ("", "."))
                if entry.isdir():
                    explicit.add(path or ".")
                while path:
                    path = path.rpartition("/")[0]
                    parents.add(path or ".")
        implied = (implied | parents) - explicit
    return implied
