#!/usr/bin/env python3
"""What a planned upgrade, a crash (without and with a warm spare) and a hang of the worker cost those who read.

At 12 images / 70 layers with a reader on each image, and at 1,000 mounts with readers on 50 of them. The readers hold files and
folders open through overlays; their operations are O_DIRECT reads of what is cached, lookups of absent names and listings. In
each round content that nobody has read is read as well, from a registry that answers 5 ms late (every other round 50 ms), so
fetches are outstanding when the worker goes. Those reads count for failures, not for latency.

Counted are operations begun or under way from the upgrade command (of a crash or hang: from the signal) until reads are taken
over (of an upgrade: until it is over) and 20 ms more. The latency added is an operation's own minus the median of the same kind of
operation in the undisturbed time between the rounds. Each case ends with rounds while the registry is down.

Every upgrade is followed by a control: a window of the same length with the same cold reads and no upgrade. What its operations
took longer than usual is the machine's doing, and that of the cold reads.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
from holdfast_harness import fleet as fleets  # noqa: E402
from holdfast_harness.containerd import Containerd  # noqa: E402
from holdfast_harness.errors import HarnessError  # noqa: E402
from holdfast_harness.holdfast import Holdfast  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.load import Event, EventLog, LoadResult, MixedLoad, Operation, Target, memory_kib  # noqa: E402
from holdfast_harness.process import wait_for  # noqa: E402
from holdfast_harness.refetched import refetched_bytes  # noqa: E402
from holdfast_harness.registry import Registry, SlowProxy  # noqa: E402

CASES = ("planned", "crash", "crash_spare", "hang")
DELAYS_MS = (5, 50)
TAIL_NS = 20_000_000
SETTLE_NS = 300_000_000  # after a window, before time counts as undisturbed
QUIET_SECONDS = 1.3  # between rounds: a worker that lives less than a second counts as crash-looping and is held back
COLD_THREADS = 4
# Of DESIGN 1, in ms: p99, max, worst; None where it sets no figure.
GOALS: dict[str, tuple[float | None, float, float]] = {
    "planned": (2, 10, 50),
    "crash": (None, 20, 80),
    "crash_spare": (None, 8, 30),
}
GOAL_FIRST_MS, GOAL_ALL_MS, GOAL_DETECT_MS = 100, 500, 5000  # of 1,000 mounts; of a hang


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Round:
    gone: int  # ns, CLOCK_MONOTONIC, as all times here: the worker was signalled; of an upgrade: it was parked
    begin: int  # of the window
    end: int
    reads_stopped: int
    taken_over: int
    pause_ms: float
    detect_ms: float
    carried_over: int


class Driver:
    """One running node under load, and the ways to disturb it."""

    def __init__(self, holdfast: Holdfast, load: MixedLoad, proxy: SlowProxy, spare: bool, rng: random.Random):
        self._holdfast, self._load, self._proxy, self._spare, self._rng = holdfast, load, proxy, spare, rng
        self._log = EventLog(holdfast.log)

    def _settled(self) -> bool:
        status = self._holdfast.status()
        roles = {worker["role"] for worker in status["workers"]}
        # Workers that retire may stay as long as containerd keeps its connection.
        return status["phase"] == "running" and "owner" in roles and ("spare" in roles) == self._spare

    def round(self, case: str, number: int, cold: bool, length_ns: int = 0) -> Round:
        """With a length: the control, in which nothing happens."""
        wait_for("the node to settle", self._settled, 30, 0.1)
        pid = self._holdfast.worker_pid()
        if cold:
            self._proxy.delay(DELAYS_MS[number % len(DELAYS_MS)])
            planned = case == "planned"
            self._load.cold(COLD_THREADS, 60 if planned else 0)
            time.sleep(0.03 + self._rng.random() * 0.05)
        try:
            if length_ns:
                return self._control(length_ns)
            return self._planned() if case == "planned" else self._death(pid, case)
        finally:
            self._load.cold(0)

    def _wait(self, what: str, name: str, since: int, seconds: float = 30) -> Event:
        return self._log.wait(f"{what} (event={name})", lambda event: event.name == name, since, seconds)

    def _planned(self) -> Round:
        asked = time.monotonic_ns()
        self._holdfast.upgrade()
        begun = self._wait("the start of the new worker", "spawned", asked)
        taken = self._wait("reads to be taken over", "reads_taken_over", begun.at)
        done = self._wait("the end of the swap", "swap", begun.at)
        if done.fields["result"] != "done":
            raise HarnessError(f"the upgrade failed: {done.fields}")
        pause = int(taken.fields["pause_ns"])
        end = max(taken.at, done.at) + TAIL_NS
        carried = int(taken.fields["requests_carried_over"])
        stopped = taken.at - pause
        return Round(stopped, asked, end, stopped, taken.at, pause / 1e6, 0, carried)

    def _control(self, length_ns: int) -> Round:
        begin = time.monotonic_ns()
        time.sleep(length_ns / 1e9)
        return Round(begin, begin, begin + length_ns, begin, begin, 0, 0, 0)

    def _death(self, pid: int, case: str) -> Round:
        fault = time.monotonic_ns()
        os.kill(pid, signal.SIGSTOP if case == "hang" else signal.SIGKILL)
        noticed = self._wait("the death to be noticed", "killed" if case == "hang" else "worker_died", fault)
        taken = self._wait("reads to be taken over", "reads_taken_over", fault)
        stopped = fault if case == "hang" else taken.at - int(taken.fields["pause_ns"])
        # Of a hang the supervisor's own figure contains the time until it was noticed.
        pause = (taken.at - noticed.at) / 1e6 if case == "hang" else int(taken.fields["pause_ns"]) / 1e6
        carried = int(taken.fields["requests_carried_over"])
        return Round(fault, fault, taken.at + TAIL_NS, stopped, taken.at, pause, (noticed.at - fault) / 1e6, carried)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def by_window(operations: list[Operation], rounds: list[Round]) -> tuple[list[list[Operation]], list[Operation]]:
    """The operations that met each round's window, and those of the undisturbed time."""
    begins = [one.begin for one in rounds]
    met: list[list[Operation]] = [[] for _ in rounds]
    undisturbed = []
    for operation in operations:
        i = bisect.bisect_right(begins, operation.end) - 1  # the last window that began before it ended
        if i >= 0 and operation.begin <= rounds[i].end:
            met[i].append(operation)
        elif i < 0 or operation.begin > rounds[i].end + SETTLE_NS:
            undisturbed.append(operation)
    return met, undisturbed


def end_of_longest_silence(operations: list[Operation], window: Round) -> int:
    """When the first answer came: the readers are so many that no other moment passes as long without one."""
    ends = [window.reads_stopped] + sorted(one.end for one in operations if one.end > window.reads_stopped)
    if len(ends) == 1:
        raise HarnessError("no operation was answered after reads had stopped")
    gaps = [(after - before, after) for before, after in zip(ends, ends[1:]) if before <= window.taken_over]
    return max(gaps)[1]


def summary(
    case: str, mounts: int, busy: int, rounds: list[Round], controls: list[Round], result: LoadResult
) -> dict[str, Any]:
    windows = sorted(rounds + controls, key=lambda one: one.begin)
    by_time, undisturbed = by_window(result.operations, windows)
    in_control = set(controls)
    met = [found for window, found in zip(windows, by_time) if window not in in_control]
    lengths: dict[str, list[float]] = defaultdict(list)
    for one in undisturbed:
        if one.kind != "cold":
            lengths[one.kind].append((one.end - one.begin) / 1e6)
    usual = {kind: statistics.median(values) for kind, values in lengths.items()}
    rest = [(one.end - one.begin) / 1e6 - usual[one.kind] for one in undisturbed if one.kind != "cold"]

    def added_to(operations: list[Operation]) -> list[float]:
        timed = [one for one in operations if one.kind != "cold"]
        if not timed:
            raise HarnessError(f"no operation met a window of {case}: the figures would mean nothing")
        return [max(0.0, (one.end - one.begin) / 1e6 - usual[one.kind]) for one in timed]

    control = [added_to(found) for window, found in zip(windows, by_time) if window in in_control]
    added: list[list[float]] = []
    first: list[float] = []
    everyone: list[float] = []
    for window, operations in zip(rounds, met):
        added.append(added_to(operations))
        timed = [one for one in operations if one.kind != "cold"]
        first_end = end_of_longest_silence(timed, window)
        answered: dict[int, int] = {}
        for one in sorted(timed, key=lambda o: o.end):
            if one.end >= first_end:
                answered.setdefault(one.target, one.end)
        first.append((first_end - window.reads_stopped) / 1e6)
        everyone.append((max(answered.values()) - window.reads_stopped) / 1e6)

    def middle(values: Sequence[float]) -> float:
        return round(statistics.median(values), 2)

    return {
        "case": case,
        "mounts": mounts,
        "busy_mounts": busy,
        "rounds": len(rounds),
        "ops_in_window": sum(len(operations) for operations in met),
        "carried_over": sum(one.carried_over for one in rounds),
        "failed_ops": result.failed,
        "corrupt_bytes": result.corrupt * fleets.BLOCK,
        "latency_added_p50_ms": middle([percentile(values, 0.5) for values in added]),
        "latency_added_p99_ms": middle([percentile(values, 0.99) for values in added]),
        "latency_added_max_ms": middle([max(values) for values in added]),
        "latency_added_worst_ms": round(max(max(values) for values in added), 2),
        "pause_ms": middle([one.pause_ms for one in rounds]),
        "detect_ms": middle([one.detect_ms for one in rounds]),
        "ops_timed": sum(len(values) for values in added),
        "first_answer_ms": middle(first),
        "all_answered_ms": middle(everyone),
        "all_answered_worst_ms": round(max(everyone), 2),
        "usual_ms": {kind: round(value, 3) for kind, value in usual.items()},
        "undisturbed_added_p99_ms": round(percentile(rest, 0.99), 2),
        "undisturbed_added_max_ms": round(max(rest), 2),
        "control_added_p99_ms": middle([percentile(values, 0.99) for values in control]) if control else None,
        "control_added_max_ms": middle([max(values) for values in control]) if control else None,
        "rounds_without_fetch_outstanding": sum(one.carried_over == 0 for one in rounds),
        "window_ms": middle([(one.end - one.begin) / 1e6 for one in rounds]),
        "errors": result.errors,
    }


@dataclasses.dataclass(frozen=True)
class Node:
    box: Instance
    registry: Registry
    proxy: SlowProxy
    holdfast: Holdfast
    containerd: Containerd
    targets: list[Target]


def start_node(box: Instance, stack: contextlib.ExitStack, fleet: fleets.Fleet, spare: bool) -> Node:
    registry = box.registry(store=fleet.store, read_only=True)
    proxy = box.slow_proxy(registry.address)
    holdfast = box.holdfast(options=["--spare"] if spare else [])
    containerd = box.containerd(holdfast)
    targets = []
    say(f"pulling {len(fleet.images)} images lazily")
    for image in fleet.images:
        containerd.rpull(f"{proxy.address}/{image.name}:esgz")
        view = stack.enter_context(containerd.mounted_view(image.chain_id, "holdfast"))
        # A name in a folder that all layers have is looked up in all of them, also in those that are to be idle.
        targets.append(Target(view, image.warm, image.cold, ancestors=fleet.busy_everywhere))
    live = int(holdfast.status()["mounts_live"])
    if live != fleet.layers:
        raise HarnessError(f"{live} mounts, not {fleet.layers}: some layer is not lazy")
    return Node(box, registry, proxy, holdfast, containerd, targets)


def run_rounds(
    node: Node, case: str, mounts: int, rounds: int, down: bool, ops: float, rng: random.Random, gone: list[tuple[int, int]]
) -> dict[str, Any]:
    """`gone` gets the times in which no worker could store anything."""
    load = MixedLoad(node.box, node.targets, ops_per_second=ops, seed=rng.randrange(1 << 30))
    driver = Driver(node.holdfast, load, node.proxy, case == "crash_spare", rng)
    time.sleep(QUIET_SECONDS)
    done: list[Round] = []
    controls: list[Round] = []
    for number in range(rounds):
        done.append(driver.round(case, number, cold=not down))
        gone.append((done[-1].gone, done[-1].taken_over))
        say(
            f"{case}{' (registry down)' if down else ''} {number + 1}/{rounds}: pause {done[-1].pause_ms:.1f} ms, detected after"
            f" {done[-1].detect_ms:.1f} ms, {done[-1].carried_over} requests carried over"
        )
        time.sleep(QUIET_SECONDS)
        if case == "planned":
            controls.append(driver.round(case, number, cold=not down, length_ns=done[-1].end - done[-1].begin))
            time.sleep(QUIET_SECONDS)
    result = load.stop()
    if result.cold_used_up:
        raise HarnessError("everything cold was read before the last round: fewer rounds, or a larger fleet")
    return summary(case, mounts, len(node.targets), done, controls, result)


def measure(case: str, fleet: fleets.Fleet, rounds: int, down_rounds: int, ops: float, seed: int) -> list[dict[str, Any]]:
    """The case, and the same while the registry is down."""
    rng = random.Random(f"{seed}/{case}/{fleet.layers}")
    with Instance("handover") as box, contextlib.ExitStack() as stack:
        node = start_node(box, stack, fleet, spare=case == "crash_spare")
        gone: list[tuple[int, int]] = []
        found = [run_rounds(node, case, fleet.layers, rounds, False, ops, rng, gone)]
        if down_rounds:
            node.registry.stop()
            asked = node.proxy.counters()["requests"]
            found.append(run_rounds(node, case, fleet.layers, down_rounds, True, ops, rng, gone))
            found[-1]["requests_to_registry"] = node.proxy.counters()["requests"] - asked
        time.sleep(3)
        refetched = refetched_bytes(node.proxy.ranges.read_text().splitlines(), gone)
        pids = {worker["role"]: int(worker["pid"]) for worker in node.holdfast.status()["workers"]}
        for one in found:
            one["bytes_refetched"] = refetched
            one["supervisor_kib"] = memory_kib(node.holdfast.supervisor_pid)
            one["worker_kib"] = memory_kib(pids["owner"])
            one["spare_kib"] = memory_kib(pids["spare"]) if "spare" in pids else None
        return found


def faults_of(one: dict[str, Any]) -> list[str]:
    """What must never be."""
    return [key for key in ("failed_ops", "corrupt_bytes", "bytes_refetched") if one[key]]


def missed(one: dict[str, Any]) -> list[str]:
    """The figures of DESIGN 1 that were not reached."""
    found = []

    def check(key: str, limit: float | None) -> None:
        if limit is not None and one[key] > limit:
            found.append(f"{key} {one[key]} > {limit}")

    if one["case"] == "hang":
        check("detect_ms", GOAL_DETECT_MS)
    elif one["mounts"] >= 1000:
        check("first_answer_ms", GOAL_FIRST_MS)
        check("all_answered_ms", GOAL_ALL_MS)
    elif one["case"] in GOALS:
        p99, most, worst = GOALS[one["case"]]
        check("latency_added_p99_ms", p99)
        check("latency_added_max_ms", most)
        check("latency_added_worst_ms", worst)
    return found


COLUMNS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("case", "<22", lambda o: o["case"] + (" registry down" if o["registry"] == "down" else "")),
    ("mounts", ">6", lambda o: o["mounts"]),
    ("rounds", ">6", lambda o: o["rounds"]),
    ("ops", ">7", lambda o: o["ops_in_window"]),
    ("carried", ">7", lambda o: o["carried_over"]),
    ("failed", ">6", lambda o: o["failed_ops"]),
    ("corrupt", ">7", lambda o: o["corrupt_bytes"]),
    ("refetched", ">9", lambda o: o["bytes_refetched"]),
    ("p50", ">7", lambda o: o["latency_added_p50_ms"]),
    ("p99", ">7", lambda o: o["latency_added_p99_ms"]),
    ("max", ">7", lambda o: o["latency_added_max_ms"]),
    ("worst", ">7", lambda o: o["latency_added_worst_ms"]),
    ("control p99/max", ">15", lambda o: f"{o['control_added_p99_ms']}/{o['control_added_max_ms']}" if o["control_added_p99_ms"] is not None else "-"),
    ("pause", ">7", lambda o: o["pause_ms"]),
    ("detect", ">7", lambda o: o["detect_ms"]),
    ("sup/worker/spare KiB", ">20", lambda o: f"{o['supervisor_kib']}/{o['worker_kib']}/{o['spare_kib'] or '-'}"),
]


def table(report: dict[str, Any]) -> str:
    lines = ["  ".join(format(name, width) for name, width, _ in COLUMNS)]
    for one in report["cases"] + report["registry_down"]:
        lines.append("  ".join(format(get(one), width) for _, width, get in COLUMNS))
    lines.append("p50 ... worst: latency added, ms; first three: median over rounds. pause, detect: ms, median.")
    lines += [f"FAULT {one['case']}: {', '.join(faults_of(one))}" for one in report["cases"] if faults_of(one)]
    lines += [f"missed by {one['case']} at {one['mounts']} mounts: {text}" for one in report["cases"] for text in missed(one)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case (may be given again)")
    parser.add_argument("--mounts", type=int, action="append", help="70 or another number with 50 busy ones (default: 70, 1000)")
    parser.add_argument("--busy", type=int, default=50, help="busy mounts, unless there are 70")
    parser.add_argument("--rounds", type=int, help="default: 20, of crashes at 70 layers 100")
    parser.add_argument("--down-rounds", type=int, default=10, help="rounds of each case while the registry is down")
    parser.add_argument("--ops-per-second", type=float, default=1200, help="of all readers together")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    report: dict[str, Any] = {"seed": options.seed, "cases": [], "registry_down": []}
    try:
        for mounts in options.mounts or [70, 1000]:
            shape = fleets.SEVENTY if mounts == 70 else fleets.many(mounts, options.busy)
            fleet = fleets.ensure(shape, say)
            for case in options.case or CASES:
                rounds = options.rounds or (100 if case.startswith("crash") and mounts == 70 else 20)
                ops = options.ops_per_second / len(fleet.images)
                found = measure(case, fleet, rounds, options.down_rounds, ops, options.seed)
                for key, state, one in zip(("cases", "registry_down"), ("up", "down"), found):
                    report[key].append({**one, "registry": state, "missed": missed(one)})
    except (HarnessError, subprocess.TimeoutExpired) as error:
        print(f"handover: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 1 if any(faults_of(one) for one in report["cases"] + report["registry_down"]) else 0


if __name__ == "__main__":
    sys.exit(main())
