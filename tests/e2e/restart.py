"""Supervisor and worker are stopped and started again while the registry is down: everything comes back from the disk."""

from __future__ import annotations

import os
import signal
import sys

from e2e_support import Node, expect, lazy_mounts, node, run_steps
from holdfast_harness import images
from holdfast_harness.process import alive, wait_for

_READ = ["sh", "-c", "sha256sum /srv/app/data/packages.db /usr/bin/perl /etc/motd; ls -lR /srv /etc | cksum"]


def _read(here: Node) -> str:
    """A new container that reads what `_warm` made the cache hold."""
    return here.containerd.run(here.lazy, _READ).stdout


def _warm(here: Node) -> str:
    here.containerd.rpull(here.lazy)
    words = _read(here)
    expect(len(words.splitlines()) == 4, f"reading failed: {words}")
    return words


def _expect_back(here: Node, words: str) -> None:
    """All layers mounted, a new container reads the same, and the network was not needed."""
    wait_for("all layers to be mounted again", lambda: lazy_mounts(here) == len(here.image.esgz.layers), 20)
    here.containerd.wait_snapshotter()
    expect(_read(here) == words, "cached content reads differently after the restart")
    rows = here.containerd.snapshots()
    expect(here.image.esgz.chain_id in rows, "containerd lost the image's snapshot")


def a_clean_restart_with_the_registry_down_serves_cached_content() -> None:
    with node("restart", images.ensure("demo")) as here:
        words = _warm(here)
        here.holdfast.stop()
        expect(lazy_mounts(here) == 0, "a stopped holdfast left mounts behind")
        here.registry.stop()
        here.holdfast.start()
        _expect_back(here, words)
        # The registry comes back: the rest is read on, and everything can be removed.
        here.registry.start()
        rest = here.containerd.run(here.lazy, ["sha256sum", "/srv/app/data/search.db"]).stdout
        expect("search.db" in rest, f"reading uncached content failed: {rest}")
        here.containerd.remove_image(here.lazy)
        wait_for("unmounting", lambda: lazy_mounts(here) == 0, 30)


def a_restart_after_both_were_killed_serves_cached_content() -> None:
    with node("restart", images.ensure("demo")) as here:
        words = _warm(here)
        worker, supervisor = here.holdfast.worker_pid(), here.holdfast.supervisor_pid
        for pid in (supervisor, worker):  # without systemd's fd store this ends the mounts (DESIGN 4.5)
            os.kill(pid, signal.SIGKILL)
        here.holdfast.wait_end()
        wait_for("the worker's end", lambda: not alive(worker), 10)
        here.registry.stop()
        here.holdfast.start()
        _expect_back(here, words)


if __name__ == "__main__":
    sys.exit(
        run_steps(
            a_clean_restart_with_the_registry_down_serves_cached_content,
            a_restart_after_both_were_killed_serves_cached_content,
        )
    )
