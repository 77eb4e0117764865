"""The registry is black-holed under ten times more waiting readers than the worker has threads, all on one mount: cached
reads of another mount keep their pace, and a reader that is killed is gone within a second."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from e2e_support import Node, expect, node, run_steps
from holdfast_harness import images
from holdfast_harness.holdfast import binary
from holdfast_harness.process import alive, run, wait_for

CONFIG = "[fuse]\nthreads = 2\n"
WAITING = 20  # ten times the threads


def _p99(root: Path, manifest: Path) -> float:
    """Of O_DIRECT reads, each of which reaches the worker, in ms: of several seconds of them the second best. What other processes
    of the machine add comes and goes."""
    command = [binary("holdfast-reader"), "read", root, manifest, "--modes", "direct", "--threads", "1"]
    found = []
    for seed in range(5):
        done = run([*command, "--seconds", "1", "--ops-per-second", "500", "--seed", str(seed)], timeout=60)
        found.append(float(json.loads(done.stdout)["latency_ms"]["direct"]["p99"]))
    return sorted(found)[1]


def _cold_files(root: Path, count: int) -> list[Path]:
    """Files of python's library that nobody has read: all of one layer, so of one mount."""
    library = next((root / "usr/lib").glob("python3.*"))
    found = [path for path in sorted(library.rglob("*.py")) if path.is_file() and path.stat().st_size > 10_000]
    return found[:: len(found) // count][:count]


def _pending_on_one_mount(here: Node) -> int:
    counts = collections.Counter(one["mount_id"] for one in here.holdfast.ctl_json("inflight")["requests"])
    return max(counts.values(), default=0)


def _measure(here: Node, warm: Path, manifest: Path, cold: Path) -> None:
    before = _p99(warm, manifest)
    here.proxy.hold()
    waiting = [
        subprocess.Popen(["cat", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for path in _cold_files(cold, WAITING)
    ]
    try:
        expect(len(waiting) == WAITING, f"only {len(waiting)} cold files")
        wait_for(f"{WAITING} requests of one mount in the ledger", lambda: _pending_on_one_mount(here) >= WAITING, 20)
        during = _p99(warm, manifest)
        print(f"cached reads, p99: {before:.2f} ms before, {during:.2f} ms with {WAITING} waiting")
        # Half a millisecond is what the scheduler of a busy machine adds to either.
        expect(during <= 2 * before + 0.5, f"p99 rose from {before} to {during} ms")
        _killed_reader_goes(waiting[0])
    finally:
        here.proxy.hold(False)
        for one in waiting:
            one.kill()
            one.wait(30)


def _killed_reader_goes(reader: subprocess.Popen[bytes]) -> None:
    expect(reader.poll() is None, "the reader does not wait any more")
    started = time.monotonic()
    reader.kill()
    reader.wait(10)
    elapsed = time.monotonic() - started
    print(f"a killed reader was gone after {elapsed * 1000:.0f} ms")
    expect(elapsed <= 1 and not alive(reader.pid), f"a killed reader lived on for {elapsed:.2f} s")


def cached_reads_keep_their_pace_and_killed_readers_go() -> None:
    demo = images.ensure("demo")
    with node("hole", demo, config=CONFIG) as here:
        here.containerd.rpull(here.lazy)
        other = images.ensure("every-object")
        plain = here.box.registry(store=other.store, read_only=True)
        here.containerd.rpull(other.reference(plain.address, "esgz"))
        with (
            here.containerd.mounted_view(other.esgz.chain_id, "holdfast") as warm,
            here.containerd.mounted_view(demo.esgz.chain_id, "holdfast") as cold,
        ):
            manifest = here.box.root / "warm.manifest"
            run([binary("holdfast-reader"), "manifest", warm, manifest], timeout=120)
            kept = [line for line in manifest.read_text().splitlines() if int(line.split(" ")[0]) < 4_000_000]
            manifest.write_text("\n".join(kept) + "\n")
            _measure(here, warm, manifest, cold)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(run_steps(cached_reads_keep_their_pace_and_killed_readers_go))
