#!/usr/bin/env python3
"""The worker is killed under 70 mounted layers of 12 images while the registry is down.

Half of the content is in the cache, and the page cache is dropped. Readers hold files open through overlays and read, with
O_DIRECT so that every read reaches the worker, what no one read since; one miss is outstanding and must complete after the
registry is back. Wanted: 0 failed reads, 0 bytes fetched while down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
sys.path.insert(0, str(Path(__file__).parent))
import bench_fleet  # noqa: E402
from holdfast_harness.errors import HarnessError  # noqa: E402
from holdfast_harness.holdfast import Holdfast, binary  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.process import run, wait_for  # noqa: E402

OPS_PER_SECOND = 100  # of each of the 12 readers


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def split(manifest: Path, folder: Path) -> tuple[Path, Path]:
    """The files of even number (to be cached) and the others (never read)."""
    lines = manifest.read_text().splitlines()
    warm, cold = folder / f"{manifest.stem}.warm", folder / f"{manifest.stem}.cold"
    warm.write_text("\n".join(lines[0::2]) + "\n")
    cold.write_text("\n".join(lines[1::2]) + "\n")
    return warm, cold


class Miss(threading.Thread):
    """One read of content that is nowhere but in the registry. Right, wrong or an error: `result` says it."""

    def __init__(self, view: Path, cold: Path):
        super().__init__(daemon=True)
        # A large file: small ones come along with their neighbours.
        line = max(cold.read_text().splitlines(), key=lambda one: int(one.split(" ")[0]))
        size, digests, path = line.split(" ", 2)
        self._path, self._size, self._digest = view / path, int(size), digests.split(",")[0]
        self.result = "still waiting"

    def run(self) -> None:
        import hashlib

        try:
            with self._path.open("rb") as file:
                data = file.read(min(self._size, 65536))
        except OSError as error:
            self.result = f"failed: {error}"
            return
        digest = f"{int.from_bytes(hashlib.sha256(data).digest()[:8], 'little'):016x}"
        self.result = "right" if digest == self._digest else "corrupt"


def start_reader(view: Path, manifest: Path, seconds: float, out: Path, seed: int) -> subprocess.Popen[bytes]:
    command = [binary("holdfast-reader"), "read", view, manifest, "--hold-open", "--modes", "direct", "--threads", "1"]
    command += ["--seconds", seconds, "--ops-per-second", OPS_PER_SECOND, "--seed", seed]
    command += ["--ready-file", out.with_suffix(".ready"), "--json", out]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, start_new_session=True)


def read_for(views: list[Path], manifests: list[Path], seconds: float, folder: Path, during: Any) -> list[dict[str, Any]]:
    """Readers on all views for `seconds`; `during` runs once they all hold their files."""
    outs = [folder / f"reader-{time.monotonic_ns()}-{i}.json" for i in range(len(views))]
    readers = [start_reader(v, m, seconds, o, i + 1) for i, (v, m, o) in enumerate(zip(views, manifests, outs))]
    try:
        wait_for("the readers", lambda: all(out.with_suffix(".ready").exists() for out in outs), 60)
        during()
        for reader in readers:
            reader.wait(seconds + 60)
    finally:
        for reader in readers:
            reader.kill()
    return [json.loads(out.read_text()) for out in outs]


def kill_repeatedly(holdfast: Holdfast, kills: int, rng: random.Random) -> None:
    for _ in range(kills):
        time.sleep(1.1 + rng.random() * 0.4)  # a worker that dies within a second counts as crash-looping and is held back
        former = holdfast.kill_worker()
        holdfast.wait_worker(unlike=former)


def longest(reports: list[dict[str, Any]]) -> float:
    return max(mode["max"] for report in reports for mode in report["latency_ms"].values())


def measure(kills: int, seed: int) -> dict[str, Any]:
    fleet = bench_fleet.ensure(say)
    rng = random.Random(seed)
    with Instance("restart") as box, contextlib.ExitStack() as stack:
        registry = box.registry(store=fleet.store, read_only=True)
        proxy = box.slow_proxy(registry.address)
        holdfast = box.holdfast()
        containerd = box.containerd(holdfast)
        views, warm, cold = [], [], []
        say("pulling 12 images lazily")
        for image in fleet.images:
            containerd.rpull(f"{proxy.address}/{image.name}:esgz")
            views.append(stack.enter_context(containerd.mounted_view(image.esgz.chain_id, "holdfast")))
            for kept, part in zip((warm, cold), split(image.manifest, box.root)):
                kept.append(part)
        say("reading half of the content")
        for view, manifest in zip(views, warm):
            run([binary("holdfast-reader"), "read", view, manifest, "--once", "--threads", "4"], timeout=120)
        layers = len(holdfast.ctl_json("mounts")["mounts"])
        say(f"registry down, {kills} kills under {layers} layers")
        registry.stop()
        run(["sync"], timeout=120)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        fetched = proxy.counters()["bytes"]
        undisturbed = read_for(views, warm, 3, box.root, lambda: None)
        miss = Miss(views[0], cold[0])
        miss.start()
        wait_for("the outstanding miss", lambda: holdfast.ctl_json("inflight")["requests"], 20)
        carried = holdfast.carried_over()
        disturbed = read_for(views, warm, kills * 2 + 3, box.root, lambda: kill_repeatedly(holdfast, kills, rng))
        carried = holdfast.carried_over() - carried
        fetched = proxy.counters()["bytes"] - fetched
        registry.start()
        miss.join(60)
        failed = sum(report["failed"] + (report["corrupt_bytes"] > 0) for report in disturbed)
        return {
            "layers": layers,
            "images": len(views),
            "kills": kills,
            "stall_max_ms": round(longest(disturbed), 2),
            "undisturbed_max_ms": round(longest(undisturbed), 2),
            "reads": sum(report["operations"] for report in disturbed),
            "failed_reads": failed + (miss.result != "right"),
            "corrupt_bytes": sum(report["corrupt_bytes"] for report in disturbed),
            "outstanding_miss": miss.result,
            "bytes_fetched": fetched,
            "requests_carried_over": carried,
            "seed": seed,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    try:
        result = measure(options.kills, options.seed)
    except (HarnessError, subprocess.TimeoutExpired) as error:
        print(f"restart: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(f"{key:24} {value}" for key, value in result.items()))
    return 0 if result["failed_reads"] == 0 and result["bytes_fetched"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
