"""The registry is black-holed under ten times more waiting readers than the worker has threads, all on one image: cached
reads of another image keep their pace, and a reader that is killed is gone within a second."""

from __future__ import annotations

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


def _reader(root: Path, manifest: Path, seconds: float) -> dict[str, float]:
    """O_DIRECT reads, each of which reaches the worker, for a while; latencies in ms."""
    command = [binary("holdfast-reader"), "read", root, manifest, "--modes", "direct", "--threads", "2"]
    done = run([*command, "--seconds", str(seconds), "--ops-per-second", "200"], timeout=seconds + 60)
    report = json.loads(done.stdout)
    latency: dict[str, float] = report["latency_ms"]["direct"]
    return latency


def _cold_files(root: Path, count: int) -> list[Path]:
    """Regular files that nobody has read, by names and attributes only; spread over the tree."""
    found = [
        path for path in sorted((root / "usr/lib").rglob("*")) if path.is_file() and not path.is_symlink()
        and path.stat().st_size > 40_000
    ]
    return found[:: max(1, len(found) // count)][:count]


def _wait_in_kernel(pids: list[int]) -> None:
    """Until each waits for its FUSE request."""

    def waiting(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "DS"
        except OSError:
            return False

    wait_for("the readers to wait", lambda: all(waiting(pid) for pid in pids), 20)


def _measure(here: Node, warm: Path, manifest: Path, cold: Path) -> None:
    _reader(warm, manifest, 1)  # warms code paths, as both measurements then find them
    before = _reader(warm, manifest, 4)
    here.proxy.hold()
    waiting = [
        subprocess.Popen(["cat", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for path in _cold_files(cold, WAITING)
    ]
    try:
        expect(len(waiting) == WAITING, f"only {len(waiting)} cold files")
        _wait_in_kernel([one.pid for one in waiting])
        inflight = lambda: len(here.holdfast.ctl_json("inflight")["requests"])  # noqa: E731
        wait_for("the requests in the ledger", lambda: inflight() >= WAITING // 2, 20)
        during = _reader(warm, manifest, 4)
        limit = max(2 * before["p99"], 2.0)
        print(f"cached reads, p99: {before['p99']:.2f} ms before, {during['p99']:.2f} ms with {inflight()} waiting")
        expect(during["p99"] <= limit, f"p99 rose from {before['p99']} to {during['p99']} ms")
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
