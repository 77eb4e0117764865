#!/usr/bin/env python3
"""Time from the start of a pull to the first output of a container: holdfast, stargz, full pull with overlayfs.

Every measurement starts with nothing: own state folders, dropped caches. The registry is at the other end of an emulated
link. The full pull takes the original gzip image. Prints a table, or JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
sys.path.insert(0, str(Path(__file__).parent))
import bench_peer  # noqa: E402
from bench_network import REGISTRY_IP, Network  # noqa: E402
from holdfast_harness import images  # noqa: E402
from holdfast_harness.containerd import Containerd  # noqa: E402
from holdfast_harness.errors import HarnessError  # noqa: E402
from holdfast_harness.images import Image  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.process import run  # noqa: E402
from holdfast_harness.registry import Registry  # noqa: E402

COMMAND = ["python3", "-c", "import json,ssl,sqlite3; print('ready', flush=True)"]


class LinkRegistry(Registry):
    """A registry that the other side of the link reaches."""

    def _settings(self, read_only: bool, users: dict[str, str] | None) -> dict[str, Any]:
        settings = super()._settings(read_only, users)
        settings["http"]["addr"] = f"0.0.0.0:{self.port}"
        return settings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def drop_caches() -> None:
    run(["sync"], timeout=120)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def first_output(containerd: Containerd, image: str, snapshotter: str) -> None:
    """Runs the command and returns when its first line is there; then ends the container."""
    process = containerd.start_container(image, COMMAND, snapshotter=snapshotter)
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != "ready":
        process.wait(30)
        raise HarnessError(f"the container said {line!r} {process.stderr.read() if process.stderr else ''}")


def measure_full(image: Image, address: str) -> dict[str, float]:
    with Instance("full") as box:
        containerd = box.containerd()
        drop_caches()
        before, start = Network.received_bytes(), time.monotonic()
        containerd.pull(image.reference(address, "gzip"), timeout=600)
        first_output(containerd, image.reference(address, "gzip"), "overlayfs")
        return {"seconds": time.monotonic() - start, "bytes": Network.received_bytes() - before}


def measure_lazy(image: Image, address: str, make: Callable[[Instance], Any]) -> dict[str, Any]:
    """`make` starts the snapshotter in the instance; it is asked for its own figures at the end."""
    with Instance("lazy") as box:
        snapshotter = make(box)
        containerd = box.containerd(snapshotter)
        drop_caches()
        before, start = Network.received_bytes(), time.monotonic()
        containerd.rpull(image.reference(address, "esgz"))
        pulled = time.monotonic()
        first_output(containerd, image.reference(address, "esgz"), "holdfast")
        end = time.monotonic()
        result: dict[str, Any] = {
            "seconds": end - start,
            "pull_seconds": pulled - start,
            "bytes": Network.received_bytes() - before,
        }
        if hasattr(snapshotter, "ctl_json"):
            layers = snapshotter.ctl_json("layers")["layers"]
            result["fetched"] = sum(layer["fetched_bytes"] for layer in layers)
            result["touched"] = sum(layer["touched_bytes"] for layer in layers)
        return result


def median(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def measure(rounds: int, mbit: float, rtt_ms: float) -> dict[str, Any]:
    image = images.ensure("demo", say)
    peer = bench_peer.build()
    results: dict[str, list[dict[str, Any]]] = {"holdfast": [], "stargz": [], "full": []}
    with Instance("coldstart") as box, Network(box, mbit, rtt_ms) as network:
        network.enter("registry")
        registry = LinkRegistry(box, store=image.store, read_only=True)
        network.enter("node")
        address = f"{REGISTRY_IP}:{registry.port}"
        config = f'[registry."{address}"]\nplain_http = true\n'
        for number in range(rounds):
            results["holdfast"].append(measure_lazy(image, address, lambda inner: inner.holdfast(config=config)))
            if peer:
                results["stargz"].append(
                    measure_lazy(image, address, lambda inner: bench_peer.StargzPeer(inner, peer, address))
                )
            results["full"].append(measure_full(image, address))
            say(f"round {number + 1}: " + ", ".join(f"{name} {r[-1]['seconds']:.2f} s" for name, r in results.items() if r))
        link = network.describe()
    lazy, stargz, full = results["holdfast"], results["stargz"], results["full"]
    return {
        "image": image.name,
        "link": link,
        "rounds": rounds,
        "lazy_first_output_s": round(median(lazy, "seconds"), 3),
        "lazy_pull_s": round(median(lazy, "pull_seconds"), 3),
        "stargz_first_output_s": round(median(stargz, "seconds"), 3) if stargz else None,
        "stargz_pull_s": round(median(stargz, "pull_seconds"), 3) if stargz else None,
        "full_first_output_s": round(median(full, "seconds"), 3),
        "bytes_fetched": int(median(lazy, "fetched")),
        "bytes_on_link": int(median(lazy, "bytes")),
        "stargz_bytes_fetched": int(median(stargz, "bytes")) if stargz else None,
        "bytes_touched": int(median(lazy, "touched")),
        "bytes_total": image.gzip.bytes,
        "all_rounds_s": {name: [round(one["seconds"], 3) for one in rows] for name, rows in results.items()},
    }


def table(result: dict[str, Any]) -> str:
    stargz = result["stargz_first_output_s"]
    rows = [
        ("", "first output", "of it the pull", "bytes"),
        ("holdfast", f"{result['lazy_first_output_s']:.2f} s", f"{result['lazy_pull_s']:.2f} s", f"{result['bytes_fetched']:,}"),
        (
            "stargz 0.19.1",
            f"{stargz:.2f} s" if stargz else "Go is missing",
            f"{result['stargz_pull_s']:.2f} s" if stargz else "",
            f"{result['stargz_bytes_fetched']:,}" if stargz else "",
        ),
        ("full pull, overlayfs", f"{result['full_first_output_s']:.2f} s", "", f"{result['bytes_total']:,}"),
    ]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (22, 14, 16, 14))) for row in rows]
    lines.append(f"touched by the command, compressed: {result['bytes_touched']:,} bytes")
    lines.append(f"image {result['image']}, {result['link']}, median of {result['rounds']} rounds")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--rtt-ms", type=float, default=20)
    options = parser.parse_args()
    try:
        result = measure(options.rounds, options.mbit, options.rtt_ms)
    except (HarnessError, subprocess.TimeoutExpired) as error:
        print(f"coldstart: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"runs": [result]}, indent=2) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
