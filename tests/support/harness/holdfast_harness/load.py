"""holdfast-reader's mixed load as a background process, and the supervisor's log as a list of events: together they say what
an operation met."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HarnessError
from .holdfast import binary
from .process import MARKER, kill_group, tail

if TYPE_CHECKING:
    from .instance import Instance

KINDS = ("direct", "absent", "list", "cached", "mapped", "open", "unlinked", "exec", "cold")  # as in load.h
_RECORD = struct.Struct("=qqIHH")


@dataclasses.dataclass(frozen=True)
class Target:
    root: Path
    warm: Path  # manifests
    cold: Path | None = None
    programs: tuple[str, ...] = ()
    ancestors: bool = True  # as in load.h


@dataclasses.dataclass(frozen=True)
class Operation:
    begin: int  # ns, CLOCK_MONOTONIC as time.monotonic_ns()
    end: int
    target: int
    kind: str
    right: bool


@dataclasses.dataclass(frozen=True)
class LoadResult:
    operations: list[Operation]
    failed: int
    corrupt: int
    counts: dict[str, int]
    errors: list[str]
    cold_used_up: bool


class MixedLoad:
    """Returns when every tree is open and everything warm was read. Ends with `stop`, or with the instance."""

    def __init__(
        self,
        box: Instance,
        targets: Sequence[Target],
        kinds: Sequence[str] = ("direct", "absent", "list"),
        ops_per_second: float = 100,
        seed: int = 1,
        start_limit: float = 300,
    ):
        name = f"load-{time.monotonic_ns()}"
        self._log = box.root / f"{name}.ops"
        self._stderr = box.root / "logs" / f"{name}.log"
        listed = box.root / f"{name}.json"
        rows = [
            {
                "root": str(target.root),
                "warm": str(target.warm),
                "cold": str(target.cold or ""),
                "programs": list(target.programs),
                "ancestors": target.ancestors,
            }
            for target in targets
        ]
        listed.write_text(json.dumps(rows))
        command = [binary("holdfast-reader"), "load", listed, self._log, "--kinds", ",".join(kinds)]
        command += ["--ops-per-second", ops_per_second, "--seed", seed]
        with self._stderr.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={MARKER: str(box.root)},
                start_new_session=True,
            )
        self._said = b""
        if self._line(start_limit) != "ready":
            raise HarnessError(f"the load did not start:\n{tail(self._stderr)}")

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            while b"\n" not in self._said:
                if not selector.select(max(0, deadline - time.monotonic())):
                    kill_group(self._process)
                    raise HarnessError(f"the load said nothing for {seconds:g} s (a read that hangs?)\n{tail(self._stderr)}")
                piece = os.read(out, 1 << 16)
                if not piece:
                    return ""
                self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n".encode())
        self._process.stdin.flush()

    def cold(self, threads: int, gap_ms: float = 0) -> int:
        """From now on so many threads read what nobody has read. How many such reads have ended so far."""
        self._say(f"cold {threads} {gap_ms}")
        answer = self._line(30).split()
        if len(answer) != 2 or answer[0] != "ok":
            raise HarnessError(f"the load answered {answer}:\n{tail(self._stderr)}")
        return int(answer[1])

    def stop(self, seconds: float = 120) -> LoadResult:
        """Waits for what is under way, at most `seconds`."""
        self._say("end")
        report = json.loads(self._line(seconds) or "{}")
        self._process.wait(30)
        if "failed" not in report:
            raise HarnessError(f"the load ended with {self._process.returncode}:\n{tail(self._stderr)}")
        operations = [
            Operation(begin, end, target, KINDS[kind], result == 0)
            for begin, end, target, kind, result in _RECORD.iter_unpack(self._log.read_bytes())
        ]
        self._log.unlink()
        return LoadResult(
            operations, report["failed"], report["corrupt"], report["counts"], report["errors"], report["cold_used_up"]
        )


@dataclasses.dataclass(frozen=True)
class Event:
    at: int  # ns, as time.monotonic_ns()
    name: str
    fields: dict[str, str]


_LINE = re.compile(r"^[IWEF](\d{4})?(\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{6}) .*?\] event=(\S+)(.*)$")
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


class EventLog:
    """The supervisor's events since this object was made, read from its log as they come."""

    def __init__(self, log: Path):
        self._log = log
        self._at = log.stat().st_size if log.exists() else 0
        self._rest = ""
        self._offset = time.time_ns() - time.monotonic_ns()
        self.events: list[Event] = []

    def poll(self) -> list[Event]:
        """What came since the last call."""
        with self._log.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        lines = (self._rest + data.decode(errors="replace")).split("\n")
        self._rest = lines.pop()
        new = [event for event in map(self._event, lines) if event]
        self.events += new
        return new

    def _event(self, line: str) -> Event | None:
        found = _LINE.match(line)
        if not found:
            return None
        year = int(found[1] or time.localtime().tm_year)
        month, day, hour, minute, second, micro = (int(found[i]) for i in range(2, 8))
        wall = time.mktime((year, month, day, hour, minute, second, 0, 0, -1))
        at = int(wall) * 1_000_000_000 + micro * 1000 - self._offset
        fields = {key: value.strip('"') for key, value in _FIELD.findall(found[9])}
        return Event(at, found[8], fields)

    def wait(self, what: str, wanted: Callable[[Event], bool], since: int, seconds: float = 30) -> Event:
        """The first event after `since` (monotonic ns) that is `wanted`."""
        deadline = time.monotonic() + seconds
        while True:
            self.poll()
            for event in self.events:
                # The clock of the log is the wall's: a millisecond of tolerance.
                if event.at >= since - 1_000_000 and wanted(event):
                    return event
            if time.monotonic() > deadline:
                raise HarnessError(f"{what}: not after {seconds:g} s")
            time.sleep(0.01)


def memory_kib(pid: int) -> int:
    """Anonymous and shared memory of a process, shared pages divided among who maps them."""
    wanted = {"Pss_Anon", "Pss_Shmem"}
    rows: dict[str, Any] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        rows[name] = int(value.split()[0])
    return sum(rows[name] for name in wanted)
