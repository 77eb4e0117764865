"""Verifying readers on overlays of lazy layers while the worker is killed and replaced again and again.

    handover_load.py [--long] [--seed S] [--soak-seconds N] [STEP...]      (HOLDFAST_LOAD=long does the same as --long)

Every reader holds files and folders open through a writable overlay: O_DIRECT reads, cached re-reads, kept mappings, folders in
the middle of their listing, absent names, files opened anew, open files that were removed, programs of the layers; and content
that nobody has read comes from a registry that answers 5 or 50 ms late. --long is what the figures in docs/TESTING.md are
about; the short form does the same fewer times.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from e2e_support import expect, run_steps
from holdfast_harness import Containerd, HarnessError, Holdfast, Instance, Registry, SlowProxy, fleet
from holdfast_harness.holdfast import binary
from holdfast_harness.load import Event, EventLog, LoadResult, MixedLoad, Target
from holdfast_harness.process import alive, wait_for

SHAPE = fleet.Shape(images=3, layers=(3,), busy_layers=3, warm_files=30, cold_files=150, programs=12)
KINDS = ("direct", "direct", "absent", "absent", "list", "cached", "mapped", "open", "unlinked", "exec")
LEDGER_SLOTS = 16  # schema/ledger.h
QUIET_SECONDS = 1.2  # a worker that lives less than a second counts as crash-looping and is held back

given = argparse.Namespace()  # filled by main


def times(short: int, long: int) -> int:
    return long if given.long else short


@dataclass
class Node:
    box: Instance
    registry: Registry
    proxy: SlowProxy
    holdfast: Holdfast
    containerd: Containerd
    targets: list[Target]
    log: EventLog
    chance: random.Random

    def load(self, kinds: Sequence[str] = KINDS, ops_per_second: float = 60) -> MixedLoad:
        return MixedLoad(self.box, self.targets, kinds, ops_per_second, seed=self.chance.randrange(1 << 30))

    def wait_event(self, name: str, since: int, seconds: float = 30) -> Event:
        return self.log.wait(f"event={name}", lambda event: event.name == name, since, seconds)

    def wait_running(self, seconds: float = 30) -> None:
        wait_for("the swap machine to run", lambda: self.holdfast.status()["phase"] == "running", seconds)

    def kill(self) -> int:
        """SIGKILL to the owner, which is seen to be dead and replaced. Requests carried over."""
        pid = self.holdfast.worker_pid()
        expect(pid > 0, "there is no worker to kill")
        since = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        died = self.wait_event("worker_died", since)
        expect(int(died.fields["pid"]) == pid, f"{died.fields} died, not {pid}")
        taken = self.wait_event("reads_taken_over", since)
        self.wait_running()
        return int(taken.fields["requests_carried_over"])

    def swap(self) -> int:
        since = time.monotonic_ns()
        swap = self.holdfast.upgrade()
        expect(swap["result"] == "done", f"the upgrade ended with {swap}")
        self.wait_event("reads_taken_over", since)
        return int(swap["requests_carried_over"])


@contextlib.contextmanager
def node(name: str, config: str = "", options: Sequence[str] = ()) -> Iterator[Node]:
    found = fleet.ensure(SHAPE, print)
    with Instance(name) as box, contextlib.ExitStack() as views:
        registry = box.registry(store=found.store, read_only=True)
        proxy = box.slow_proxy(registry.address)
        holdfast = box.holdfast(config=config, options=options)
        containerd = box.containerd(holdfast)
        targets = []
        for image in found.images:
            containerd.rpull(f"{proxy.address}/{image.name}:esgz")
            view = views.enter_context(containerd.mounted_view(image.chain_id, "holdfast", writable=True))
            targets.append(Target(view, image.warm, image.cold, image.programs))
        expect(int(holdfast.status()["mounts_live"]) == found.layers, "not every layer is lazy")
        yield Node(box, registry, proxy, holdfast, containerd, targets, EventLog(holdfast.log), random.Random(given.seed))


def expect_unharmed(result: LoadResult, kinds: Sequence[str] = KINDS) -> None:
    expect(result.failed == 0, f"{result.failed} operations failed: {result.errors}")
    expect(result.corrupt == 0, f"{result.corrupt} operations saw something wrong: {result.errors}")
    for kind in {*kinds, "cold"}:
        expect(result.counts.get(kind, 0) > 0, f"nothing of the kind {kind} was done: {result.counts}")
    print(f"{len(result.operations)} operations, 0 failed, 0 wrong: {result.counts}")


def readers_notice_neither_swaps_nor_kills() -> None:
    with node("load") as here:
        rounds = times(10, 100)
        load = here.load()
        carried: dict[tuple[str, int], int] = {}
        for number in range(rounds):
            for what, disturb in (("swap", here.swap), ("kill", here.kill)):
                delay = (5, 50)[number % 2]
                here.proxy.delay(delay)
                load.cold(3, gap_ms=times(140, 350))
                time.sleep(QUIET_SECONDS / 2 + here.chance.random() * 0.1)
                key = (what, delay)
                carried[key] = carried.get(key, 0) + disturb()
                load.cold(0)
                time.sleep(QUIET_SECONDS / 2)
        result = load.stop()
        expect_unharmed(result)
        status = here.holdfast.status()
        expect(int(status["crashes"]) == rounds, f"{status['crashes']} crashes counted, {rounds} were caused")
        print(f"{rounds} swaps and {rounds} kills; requests carried over: {carried}")
        # Whether one was outstanding at the very moment is chance, and at 5 ms an answer a few rounds may miss it each time.
        for what in ("swap", "kill"):
            count = sum(number for key, number in carried.items() if key[0] == what)
            expect(count > 0, f"no request was ever outstanding in a {what}: that proves nothing")


def a_fetch_outstanding_through_many_kills_gets_its_data() -> None:
    """The registry holds its answers: not before the last kill does it give them."""
    seconds, kills = times(15, 60), times(20, 100)
    with node("fetch", config='[fetch]\nmiss_timeout = "10m"\n' if given.long else "") as here:
        load = here.load(("direct", "absent"))
        here.proxy.hold()
        readers = 6
        load.cold(readers)
        wait_for("the reads to wait", lambda: len(here.holdfast.ctl_json("inflight")["requests"]) >= readers, 20)
        begun, done = time.monotonic(), 0
        while done < kills or time.monotonic() < begun + seconds:
            expect(time.monotonic() < begun + seconds + kills * 5, f"only {done} kills until now")
            if done < kills:
                expect(here.kill() >= readers, "a waiting read was not carried over")
                done += 1
            time.sleep(max(0.0, seconds / kills - 0.4))
        held = time.monotonic() - begun
        expect(load.cold(0) == 0, "a read ended while the registry held its answer")
        here.proxy.hold(False)
        result = load.stop()
        expect_unharmed(result, ("direct", "absent"))
        expect(result.counts["cold"] == readers, f"{result.counts['cold']} cold reads, {readers} were begun")
        print(f"{readers} reads waited {held:.0f} s through {done} kills and got their data")


class Compaction(threading.Thread):
    """Memory is compacted over and over, so pages are taken from under every process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.rounds, self._end = 0, False

    def run(self) -> None:
        while not self._end:
            Path("/proc/sys/vm/compact_memory").write_text("1")
            self.rounds += 1
            time.sleep(0.02)

    def stop(self) -> int:
        self._end = True
        self.join(60)
        return self.rounds


def readers_notice_no_kill_under_memory_compaction() -> None:
    with node("compact") as here:
        here.proxy.delay(5)
        load = here.load()
        compaction = Compaction()
        compaction.start()
        carried, kills = 0, times(6, 100)
        for _ in range(kills):
            load.cold(3, gap_ms=times(40, 200))
            time.sleep(QUIET_SECONDS / 2)
            carried += here.kill()
            load.cold(0)
            time.sleep(QUIET_SECONDS / 2)
        rounds = compaction.stop()
        expect_unharmed(load.stop())
        expect(rounds >= kills, f"memory was compacted only {rounds} times")
        expect(carried > 0, "no request was ever outstanding")
        print(f"{kills} kills, memory compacted {rounds} times, {carried} requests carried over")


class Descriptors(NamedTuple):
    """What supervisor and worker hold open. Not counted is what a worker has as many of as were needed at once, and that
    dies with it: connections to the registry, and the pipes through which it replies, one a thread that replies. The pipes
    of ledgers, which a failover passes on, are the supervisor's as well."""

    supervisor: Counter[str]
    worker: Counter[str]

    @staticmethod
    def of(here: Node) -> Descriptors:
        supervisor, worker = _links(here.holdfast.supervisor_pid), _links(here.holdfast.worker_pid())
        passed_on = set(supervisor)
        for link in [link for link in worker if link.startswith("pipe:") and link not in passed_on]:
            del worker[link]
        return Descriptors(_by_kind(supervisor), _by_kind(worker))

    def more_than(self, before: Descriptors) -> dict[str, int]:
        """By kind, what either process holds more of than before."""
        return dict((self.supervisor - before.supervisor) + (self.worker - before.worker))


def _links(pid: int) -> Counter[str]:
    """What each descriptor is of, without connections to the registry."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    connections = {f"socket:[{line.split()[9]}]" for table in tables for line in table}
    links: Counter[str] = Counter()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links[os.readlink(descriptor)] += 1
    return Counter({link: count for link, count in links.items() if link not in connections})


def _by_kind(links: Counter[str]) -> Counter[str]:
    """Files and sockets are one kind: which of them are open just then, the store's and containerd's, changes."""
    kinds: Counter[str] = Counter()
    for link, count in links.items():
        file = link.startswith("/") and not link.startswith(("/dev/fuse", "/memfd:"))
        kinds["file or socket" if file or link.startswith("socket:") else re.sub(r":\[\d+\]$", "", link)] += count
    return kinds


def a_hundred_failovers_leave_no_descriptor_more_than_one() -> None:
    with node("fds") as here:
        load = here.load(("direct", "absent"))
        load.cold(1, gap_ms=200)
        here.kill()
        load.cold(0)
        time.sleep(3)  # ledgers are dropped and connections settle
        first = Descriptors.of(here)
        expect(first.worker["pipe"] >= 2 * LEDGER_SLOTS, f"the worker holds no pipes of its ledger: {first.worker}")
        failovers = times(20, 100)
        for _ in range(failovers - 1):
            load.cold(1, gap_ms=200)
            here.kill()
            load.cold(0)
            time.sleep(QUIET_SECONDS)
        more: dict[str, int] = {}

        def settled() -> bool:
            nonlocal more
            more = Descriptors.of(here).more_than(first)
            return not more

        try:
            wait_for("the descriptors", settled, 15, 0.5)
        except HarnessError:
            raise AssertionError(f"after {failovers} failovers there are more descriptors than after one: {more}") from None
        expect_unharmed(load.stop(), ("direct", "absent"))
        now = Descriptors.of(here)
        print(f"descriptors of the supervisor: {sum(first.supervisor.values())} after one failover,"
              f" {sum(now.supervisor.values())} after {failovers}; of the worker: {sum(first.worker.values())},"
              f" {sum(now.worker.values())}")  # fmt: skip


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def _new_child(here: Node, before: set[int]) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        new = _children(here.holdfast.supervisor_pid) - before
        if new:
            return new.pop()
        time.sleep(0.0005)
    raise AssertionError("no replacement was started")


def a_replacement_that_dies_while_it_starts_is_replaced() -> None:
    with node("replace") as here:
        here.proxy.delay(50)
        load = here.load()
        for _ in range(times(1, 5)):
            for wait_ms in (0, 50, 130, 400):
                load.cold(3, gap_ms=40)
                time.sleep(0.1)
                owner = here.holdfast.worker_pid()
                before = _children(here.holdfast.supervisor_pid)
                since = time.monotonic_ns()
                os.kill(owner, signal.SIGKILL)
                second = _new_child(here, before)
                time.sleep(wait_ms / 1000)
                os.kill(second, signal.SIGKILL)
                for pid in (owner, second):
                    exited = lambda event: event.name == "exited" and event.fields["pid"] == str(pid)  # noqa: B023, E731
                    how = here.log.wait(f"the exit of {pid}", exited, since).fields["how"]
                    expect(how.startswith("signal 9"), f"{pid} ended by {how}, not by the kill")
                here.holdfast.wait_worker(unlike=owner)
                here.wait_running()
                expect(here.holdfast.worker_pid() not in (owner, second), "a dead worker is called the owner")
                load.cold(0)
                print(f"the replacement was killed {wait_ms} ms after its start and was replaced")
                time.sleep(QUIET_SECONDS)
        expect_unharmed(load.stop())


def _bad_worker(here: Node) -> Path:
    """A program that starts and ends at once."""
    path = here.box.root / "bad-worker"
    if not path.exists():
        path.write_text("#!/bin/sh\nexit 3\n")
        path.chmod(0o755)
    return path


def _upgrade_to_a_bad_build(here: Node) -> None:
    owner = here.holdfast.worker_pid()
    done = here.holdfast.ctl("upgrade", "--worker", _bad_worker(here), check=False)
    expect(done.returncode == 1, f"an upgrade to a program that is no worker ended with {done.returncode}: {done.stdout}")
    expect(here.holdfast.worker_pid() == owner and alive(owner), "the running worker did not survive a refused upgrade")


class Faults:
    """What the soak does to a node with a spare. Each checks that it happened."""

    def __init__(self, here: Node):
        self._here = here
        # Another build: the same program with something behind its end.
        other = here.box.root / "other-build"
        other.write_bytes(binary("holdfast-worker").read_bytes() + here.chance.randbytes(16))
        other.chmod(0o755)
        self._builds = {_sha256(path): path for path in (binary("holdfast-worker"), other)}

    def _running(self) -> str:
        """Digest of the owner's program."""
        owners = [one for one in self._here.holdfast.status()["workers"] if one["role"] == "owner"]
        expect(len(owners) == 1, f"{len(owners)} owners")
        return str(owners[0]["executable"])

    def kill(self) -> None:
        self._here.kill()

    def hang(self) -> None:
        pid = self._here.holdfast.worker_pid()
        since = time.monotonic_ns()
        os.kill(pid, signal.SIGSTOP)
        killed = self._here.wait_event("killed", since)
        expect(int(killed.fields["pid"]) == pid, f"{killed.fields} was killed, {pid} was stopped")
        self._here.wait_event("reads_taken_over", since)

    def supervisor_killed(self) -> None:
        self._next_supervisor(signal.SIGKILL)

    def supervisor_restarted(self) -> None:
        self._next_supervisor(signal.SIGTERM)

    def _next_supervisor(self, how: signal.Signals) -> None:
        """The worker goes on meanwhile, and the next supervisor goes on with it."""
        holdfast = self._here.holdfast
        worker, former = holdfast.worker_pid(), holdfast.supervisor_pid
        os.kill(former, how)
        holdfast.wait_end()
        expect(alive(worker), "the worker ended with its supervisor")
        time.sleep(self._here.chance.random())
        holdfast.start()
        expect(holdfast.supervisor_pid != former, "the supervisor did not end")
        expect(holdfast.worker_pid() == worker, f"{holdfast.worker_pid()} serves, not {worker}, which lived on")

    def swap_to_the_same_build(self) -> None:
        self._here.swap()

    def swap_to_another_build(self) -> None:
        other = next(digest for digest in self._builds if digest != self._running())
        swap = self._here.holdfast.ctl_json("upgrade", "--worker", self._builds[other])["swap"]
        expect(swap["result"] == "done" and self._running() == other, f"the upgrade ended with {swap}")

    def rollback(self) -> None:
        before = self._running()
        self.swap_to_another_build()
        self._here.holdfast.ctl("rollback")
        expect(self._running() == before, "a rollback did not bring the former build back")

    def refused_upgrade(self) -> None:
        _upgrade_to_a_bad_build(self._here)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def readers_notice_nothing_of_random_faults() -> None:
    with node("soak", options=["--spare", "--probation", "5"]) as here:
        faults = Faults(here)
        names = [name for name in dir(faults) if not name.startswith("_")]
        load = here.load()
        done: dict[str, int] = {}
        end = time.monotonic() + times(25, given.soak_seconds)
        while time.monotonic() < end or len(done) < len(names):
            here.proxy.delay(here.chance.choice((0, 5, 50, 200)))
            # What nobody has read lasts for the whole of it.
            load.cold(here.chance.randrange(4), gap_ms=times(60, round(given.soak_seconds / 0.6)))
            time.sleep(here.chance.random() * 2)
            # In the short form each comes before one comes again.
            left = [name for name in names if name not in done] if time.monotonic() > end - 15 else names
            name = here.chance.choice(left or names)
            print(f"{name} ...", flush=True)
            getattr(faults, name)()
            here.wait_running()
            done[name] = done.get(name, 0) + 1
        load.cold(1, gap_ms=100)
        time.sleep(0.3)
        expect_unharmed(load.stop())
        print(f"faults: {done}")


STEPS = (
    readers_notice_neither_swaps_nor_kills,
    a_fetch_outstanding_through_many_kills_gets_its_data,
    readers_notice_no_kill_under_memory_compaction,
    a_hundred_failovers_leave_no_descriptor_more_than_one,
    a_replacement_that_dies_while_it_starts_is_replaced,
    readers_notice_nothing_of_random_faults,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", default=os.environ.get("HOLDFAST_LOAD") == "long")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--soak-seconds", type=int, default=1800, help="of the random faults of the long form")
    parser.add_argument("step", nargs="*", choices=[[], *(step.__name__ for step in STEPS)])
    parser.parse_args(namespace=given)
    print(f"seed {given.seed}")
    return run_steps(*(step for step in STEPS if not given.step or step.__name__ in given.step))


if __name__ == "__main__":
    sys.exit(main())
