"""What was fetched again although it was on the disk, from the lines that slow_proxy.py writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

# A worker that lived on for so long after the whole answer had been passed to it has stored what came.
STORED_AFTER_NS = 500_000_000


def refetched_bytes(lines: Iterable[str], gone: Sequence[tuple[int, int]]) -> int:
    """`gone`: from when to when no worker could store anything: stopped, dead or parked, until the next one read. What was under
    way then was never stored, and is fetched again as it must be."""

    def could_be_stored(answered: int) -> bool:
        return all(end < answered or begin > answered + STORED_AFTER_NS for begin, end in gone)

    total = 0
    answers: list[tuple[int, str, int, int]] = []  # in the order of time, not stored yet
    stored: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in lines:
        words = line.split()
        at, event, blob, first, end = int(words[0]), words[1], words[2], int(words[3]), int(words[4]) + 1
        while answers and answers[0][0] + STORED_AFTER_NS <= at:
            answered, of, begin, last = answers.pop(0)
            if could_be_stored(answered):
                stored[of].append((begin, last))
        if event == "answered":
            answers.append((at, blob, first, end))
        else:
            total += sum(max(0, min(end, b) - max(first, a)) for a, b in stored[blob])
    return total
