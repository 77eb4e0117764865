"""containerd's own client (compat/snapshots, Go) calls the snapshots service without pause while the worker is swapped again and
again, with calls among them that last 20 s because the registry answers so late. No call fails, and no short one waits for the
hand-over.

    snapshots_load.py [--long]      (HOLDFAST_LOAD=long does the same: 50 swaps, and 20 s; else 8 and 5 s)

Needs Go. A machine has waits of its own: what is allowed is 100 ms more than the longest of those calls of the run that met no swap.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))
from e2e_support import expect, run_steps  # noqa: E402
from holdfast_harness import HarnessError, Instance, fleet, images  # noqa: E402
from holdfast_harness.process import MARKER, kill_group, run, wait_for  # noqa: E402
from holdfast_harness.registry import get_json  # noqa: E402

SHAPE = fleet.Shape(images=3, layers=(3,), busy_layers=3, warm_files=30, cold_files=150, programs=12)  # of e2e/handover_load.py
LIMIT_MS = 100

options = argparse.Namespace()  # filled by main


def _build() -> Path:
    if not shutil.which("go"):
        raise HarnessError("this test needs Go (1.26): containerd's client is a Go package")
    program = images.cache_folder() / "snapshots-load"
    run(["go", "build", "-o", program, "."], cwd=Path(__file__).parent / "snapshots", timeout=1500)
    return program


class Caller:
    def __init__(self, box: Instance, program: Path, socket: Path):
        self._log = box.root / "logs" / "caller.log"
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(program), "-address", str(socket)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={MARKER: str(box.root)},
                start_new_session=True,
            )
        expect(self._line(30) == "ready", f"the caller did not start: {self._log.read_text()}")

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:  # it writes line by line, and only when asked
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                kill_group(self._process)  # type: ignore[arg-type]
                raise HarnessError(f"the caller said nothing for {seconds:g} s: a call hangs\n{self._log.read_text()}")
        return self._process.stdout.readline().strip()

    def ask(self, words: str, seconds: float = 20) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        answer = self._line(seconds)
        expect(answer, f"the caller ended: {self._log.read_text()}")
        return answer

    def report(self, last: bool = False) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.ask("end" if last else "report", 120))
        return report

    def long_calls(self) -> int:
        return int(self.ask("long").split()[1])


def _remote_labels(address: str, image: fleet.FleetImage) -> list[dict[str, str]]:
    """What containerd says when it asks for a layer of the image as a remote snapshot; one for each layer."""
    layers = get_json(address, f"{image.name}/manifests/esgz")["layers"]
    return [
        {
            "containerd.io/snapshot.ref": f"chain-{image.name}-{number}",
            "containerd.io/snapshot/cri.image-ref": f"{address}/{image.name}:esgz",
            "containerd.io/snapshot/cri.layer-digest": layer["digest"],
            "containerd.io/snapshot/cri.image-layers": ",".join(one["digest"] for one in layers[number:]),
            **{key: value for key, value in layer.get("annotations", {}).items() if "toc.digest" in key},
        }
        for number, layer in enumerate(layers)
    ]


def _longest(slow: list[dict[str, Any]], upgrades: list[tuple[int, int]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the short calls by name, in ms: the longest that met an upgrade, from its command to its end, and the longest of the others."""
    met: dict[str, float] = {}
    others: dict[str, float] = {}
    for call in slow:
        if call["name"] == "long prepare":
            continue
        begin, end = call["begin"], call["begin"] + call["ms"] * 1e6
        found = met if any(begin <= last and first <= end for first, last in upgrades) else others
        found[call["name"]] = max(found.get(call["name"], 0), call["ms"])
    return met, others


def no_call_fails_or_waits_while_workers_are_swapped() -> None:
    program = _build()
    found = fleet.ensure(SHAPE, print)
    swaps, long_seconds = (50, 20) if options.long else (8, 5)
    with Instance("calls") as box:
        registry = box.registry(store=found.store, read_only=True)
        proxy = box.slow_proxy(registry.address)
        holdfast = box.holdfast(config='[snapshotter]\nlazy_deadline = "60s"\n')
        # An image each: the layers of one image are resolved together.
        slow = [_remote_labels(proxy.address, image)[0] for image in found.images]
        caller = Caller(box, program, holdfast.snapshotter_socket)
        time.sleep(3)
        begun_at, started, lasted = 0.0, 0, 0
        upgrades: list[tuple[int, int]] = []  # Unix ns
        for number in range(swaps):
            if begun_at and time.monotonic() - begun_at >= long_seconds:
                proxy.hold(False)
                begun_at = 0.0
            if not begun_at and started < len(slow) and number >= swaps * started / len(slow):
                wait_for("the end of the last long call", lambda: caller.long_calls() == 0, 30)
                proxy.hold()
                caller.ask(f"long long-{started} {json.dumps(slow[started])}")
                proxy.wait_held(1)
                started, begun_at = started + 1, time.monotonic()
            outstanding = caller.long_calls()
            asked = time.time_ns()
            result = holdfast.upgrade()["result"]
            upgrades.append((asked, time.time_ns()))
            expect(result == "done", f"swap {number + 1}: {result}")
            lasted += outstanding > 0 and caller.long_calls() > 0
            time.sleep(0.5)
        while begun_at and time.monotonic() - begun_at < long_seconds:
            time.sleep(0.1)
        proxy.hold(False)
        report = caller.report(last=True)
    met, others = _longest(report.pop("slow"), upgrades)
    print(f"in {swaps} swaps: {report}\n{lasted} swaps happened under a long call")
    print(f"longest in a swap, ms: {met}\nlongest between the swaps, ms: {others}")
    expect(report["failed"] == 0, f"{report['failed']} calls failed: {report['errors']}")
    expect(report["calls"].get("long prepare") == started > 0, f"{started} long calls begun: {report['calls']}")
    expect(report["max_ms"]["long prepare"] >= long_seconds * 900, "the long calls were not long")
    expect(lasted > 0, "no swap happened while a long call was under way")
    own = max(others.values(), default=0)
    for name, longest in met.items():
        expect(longest <= own + LIMIT_MS, f"in a swap a {name} took {longest} ms; calls that met none at most {own} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", default=os.environ.get("HOLDFAST_LOAD") == "long")
    parser.parse_args(namespace=options)
    return run_steps(no_call_fails_or_waits_while_workers_are_swapped)


if __name__ == "__main__":
    sys.exit(main())
