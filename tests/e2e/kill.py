"""The worker dies by SIGKILL at random moments while `tar` reads a whole container from cold. No read fails, and the
checksum is that of the undisturbed image.

    kill.py [--runs N] [--seed S]       (defaults: HOLDFAST_KILL_RUNS or 5; a seed from the clock, printed)

The registry answers 10 ms late, so that requests are outstanding; a run counts only if at least one of its kills left
requests in the ledger, and fails otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from e2e_support import Node, expect, node, run_steps, setting
from holdfast_harness import images

# Everything that runc does not mount over, in one order. Times are the content oracle's business: an ordinary unpack gives
# some directories the moment of unpacking.
_READ = ["sh", "-c", "tar --sort=name --numeric-owner --mtime=@0 -C / -cf - bin etc home lib opt root sbin srv usr var"
         " | sha256sum && echo complete"]  # fmt: skip
_DELAY_MS = 10
_SLOWEST_RUN = 300.0


def _read_whole(here: Node, image: str, snapshotter: str) -> str:
    done = here.containerd.run(image, _READ, snapshotter=snapshotter, timeout=_SLOWEST_RUN)
    expect("complete" in done.stdout and not done.stderr, f"tar failed undisturbed: {done.stdout} {done.stderr}")
    return done.stdout.split()[0]


def _undisturbed(image: images.Image) -> tuple[str, float]:
    """The right checksum, from an ordinary unpack; and how long holdfast takes when nothing happens."""
    with node("kill", image, _DELAY_MS) as here:
        here.containerd.pull(here.plain)
        right = _read_whole(here, here.plain, "overlayfs")
        here.containerd.rpull(here.lazy)
        started = time.monotonic()
        expect(_read_whole(here, here.lazy, "holdfast") == right, "the undisturbed checksum is wrong")
        return right, time.monotonic() - started


def _disturbed(image: images.Image, right: str, usual: float, chance: random.Random) -> tuple[int, int]:
    """One run: kills while tar reads. (kills, requests carried over)"""
    with node("kill", image, _DELAY_MS) as here:
        here.containerd.rpull(here.lazy)
        reader = here.containerd.start_container(here.lazy, _READ)
        kills, limit = 0, time.monotonic() + _SLOWEST_RUN
        while reader.poll() is None:
            if time.monotonic() > limit:
                raise AssertionError(f"tar hangs after {kills} kills:\n{here.holdfast.ctl('inflight').stdout}")
            time.sleep(chance.uniform(0.05, max(0.5, usual / 3)))
            if reader.poll() is None:
                killed = here.holdfast.kill_worker()
                kills += 1 if killed else 0
                here.holdfast.wait_worker(unlike=killed)
        out, err = reader.communicate(timeout=30)
        expect(reader.returncode == 0 and "complete" in out and not err, f"tar failed after {kills} kills: {out} {err}")
        expect(out.split()[0] == right, f"wrong checksum after {kills} kills: {out.split()[0]}, not {right}")
        return kills, here.holdfast.carried_over()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=setting("HOLDFAST_KILL_RUNS", 5))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    image = images.ensure("demo", print)
    chance = random.Random(options.seed)
    print(f"seed {options.seed}")

    def no_read_fails_when_the_worker_is_killed_at_random_moments() -> None:
        right, usual = _undisturbed(image)
        print(f"undisturbed: {right}, {usual:.1f} s")
        for number in range(1, options.runs + 1):
            kills, carried = _disturbed(image, right, usual, chance)
            print(f"run {number}: {kills} kills, {carried} requests carried over, checksum right", flush=True)
            expect(kills > 0 and carried > 0, "no kill found requests in the ledger: the run proves nothing")

    return run_steps(no_read_fails_when_the_worker_is_killed_at_random_moments)


if __name__ == "__main__":
    sys.exit(main())
