"""Content oracle: a tree read through holdfast equals the same image unpacked by containerd's overlayfs snapshotter.

    content_oracle.py demo|every-object

Compared are names, types, modes, owners, sizes, times, xattrs, link targets, hard links, device numbers and the bytes of
every file. The oracle is the original gzip image: the converted one holds the same objects. Allowed differences:

* mtimes in whole seconds (rounded): eStargz stores no more;
* the mtime of a directory that the topmost layer with something in it does not itself contain: an ordinary unpack gives
  it the moment of unpacking, holdfast the time it has in the layer below.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from e2e_support import Node, expect, lazy_mounts, node, run_steps
from holdfast_harness import images, oci_layout, tree


def _layer_files(image: images.Image) -> list[Path]:
    """The original's layers in the store of the registry."""
    blobs = image.store / "docker/registry/v2/blobs/sha256"
    return [blobs / digest[7:9] / digest[7:] / "data" for digest in image.gzip.layers]


def _compare(here: Node) -> None:
    here.containerd.pull(here.plain)
    here.containerd.rpull(here.lazy)
    expect(lazy_mounts(here) == len(here.image.esgz.layers), f"{lazy_mounts(here)} lazy layers, not all are")
    untimed = frozenset(oci_layout.implied_directories(_layer_files(here.image)))
    with (
        here.containerd.mounted_view(here.image.gzip.chain_id, "overlayfs") as plain,
        here.containerd.mounted_view(here.image.esgz.chain_id, "holdfast") as lazy,
    ):
        expected = tree.read_tree(plain)
        for reading in ("cold", "again"):
            found = tree.differences(expected, tree.read_tree(lazy), untimed)
            expect(not found, f"{len(found)} differences, read {reading}:\n" + "\n".join(found[:50]))
    kinds = {entry.kind for entry in expected.values()}
    print(f"{len(expected)} objects of the kinds {', '.join(sorted(kinds))} are equal")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", choices=("demo", "every-object"))
    image = images.ensure(parser.parse_args().image, print)

    def the_lazy_tree_equals_the_unpacked_one() -> None:
        with node("oracle", image) as here:
            _compare(here)

    return run_steps(the_lazy_tree_equals_the_unpacked_one)


if __name__ == "__main__":
    sys.exit(main())
