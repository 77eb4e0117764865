"""From the pull to the last byte freed: two namespaces, containers, snapshots, removal, and images that cannot be lazy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from e2e_support import Node, expect, lazy_mounts, node, run_steps
from holdfast_harness import images, mounts
from holdfast_harness.process import run, wait_for

_HELLO = ["sh", "-c", "cat /etc/motd && python3 -c 'import json; print(json.dumps([1]))'"]


def _snapshot_folders(here: Node) -> list[str]:
    """Folders of snapshots on disk; looks at names only, never below them."""
    folder = here.holdfast.state / "snapshots"
    return sorted(os.listdir(folder)) if folder.exists() else []


def _expect_all_freed(here: Node) -> None:
    """After containerd's garbage collection the unmounting happens in the background."""
    wait_for("unmounting of the layers", lambda: lazy_mounts(here) == 0, 30)
    wait_for("deletion of the folders", lambda: not _snapshot_folders(here), 30)
    expect(not here.holdfast.ctl_json("snapshots")["snapshots"], "holdfastctl still lists snapshots")
    expect(int(here.holdfast.status()["mounts_live"]) == 0, "the supervisor still holds mounts")


def _say_hello(here: Node, namespace: str | None = None, snapshotter: str = "holdfast") -> None:
    done = here.containerd.run(here.lazy, _HELLO, namespace=namespace, snapshotter=snapshotter)
    expect(done.stdout == "Welcome to the demo image.\n[1]\n", f"said: {done.stdout}{done.stderr}")


def two_namespaces_pull_and_run_the_same_image() -> None:
    with node("life", images.ensure("demo")) as here:
        for namespace in ("hf-one", "hf-two"):
            here.containerd.rpull(here.lazy, namespace=namespace)
            _say_hello(here, namespace)
        layers = here.holdfast.ctl_json("layers")["layers"]
        found = {layer["digest"] for layer in layers}
        expect(found == set(here.image.esgz.layers), f"layers listed: {found}")
        expect(all(layer["image"] == here.lazy for layer in layers), "a layer does not name its image")
        fetched = sum(int(layer["fetched_bytes"]) for layer in layers)
        expect(0 < fetched < here.image.esgz.bytes // 2, f"fetched {fetched} of {here.image.esgz.bytes} bytes")

        here.containerd.remove_image(here.lazy, namespace="hf-one")
        _say_hello(here, "hf-two")  # the other namespace's snapshots are its own
        here.containerd.remove_image(here.lazy, namespace="hf-two")
        _expect_all_freed(here)


def a_snapshot_committed_on_top_is_a_parent_like_any_other() -> None:
    with node("life", images.ensure("demo")) as here:
        here.containerd.rpull(here.lazy)
        top = here.image.esgz.chain_id
        words = ("snapshots", "--snapshotter", "holdfast")
        target = here.box.root / "mnt"
        target.mkdir()
        here.containerd.ctr(*words, "prepare", "work", top)
        line = here.containerd.ctr(*words, "mounts", target, "work").stdout
        run(line.split())
        try:
            (target / "etc/motd").write_text("Changed.\n")
            (target / "usr/bin/perl").unlink()
            os.chmod(target / "srv/app", 0o700)
        finally:
            mounts.unmount(str(target))
        here.containerd.ctr(*words, "commit", "changed", "work")
        with here.containerd.mounted_view("changed", "holdfast") as view:
            expect((view / "etc/motd").read_text() == "Changed.\n", "the changed file is not seen")
            expect(not (view / "usr/bin/perl").exists(), "the deleted file is still there")
            expect((view / "srv/app").stat().st_mode & 0o777 == 0o700, "the changed mode is not seen")
            expect((view / "usr/bin/python3").exists(), "a file of the lazy layers is missing")
        rows = here.containerd.snapshots()
        expect(rows.get("changed") == (top, "Committed"), f"containerd lists {rows.get('changed')}")
        here.containerd.ctr(*words, "rm", "changed")
        here.containerd.remove_image(here.lazy)
        _expect_all_freed(here)


def a_running_container_reads_on_after_its_image_was_removed() -> None:
    with node("life", images.ensure("demo")) as here:
        here.containerd.rpull(here.lazy)
        here.containerd.run(here.lazy, ["sleep", "1000"], options=("--detach",), name="sleeper")
        here.containerd.remove_image(here.lazy)
        held = lazy_mounts(here)
        expect(held == len(here.image.esgz.layers), f"{held} layers are mounted under a running container")
        # Never read before: it has to come from the registry now.
        before = here.proxy.counters()["requests"]
        out = here.containerd.exec("sleeper", ["sha256sum", "/srv/app/data/search.db", "/usr/bin/perl"])
        expect(len(out.splitlines()) == 2 and "/usr/bin/perl" in out, f"reading failed: {out}")
        expect(here.proxy.counters()["requests"] > before, "nothing was fetched: the data had been read before")
        here.containerd.delete_container("sleeper")
        _expect_all_freed(here)


def a_container_whose_snapshots_were_deleted_under_it_reads_on() -> None:
    with node("life", images.ensure("demo")) as here:
        here.containerd.rpull(here.lazy)
        here.containerd.run(here.lazy, ["sleep", "1000"], options=("--detach",), name="sleeper")
        here.containerd.ctr("snapshots", "--snapshotter", "holdfast", "rm", "sleeper")
        here.containerd.remove_image(here.lazy)
        wait_for("unmounting of the layers", lambda: lazy_mounts(here) == 0, 30)
        # The container's overlay still holds the file systems: they are served on, detached.
        expect(int(here.holdfast.status()["mounts_detached"]) == len(here.image.esgz.layers), "mounts are not detached")
        before = here.proxy.counters()["requests"]
        out = here.containerd.exec("sleeper", ["sha256sum", "/srv/app/data/library.zip", "/usr/bin/perl"])
        expect(len(out.splitlines()) == 2, f"reading failed: {out}")
        expect(here.proxy.counters()["requests"] > before, "nothing was fetched: the data had been read before")
        here.containerd.delete_container("sleeper")
        wait_for("the end of the detached mounts", lambda: int(here.holdfast.status()["mounts_detached"]) == 0, 30)
        _expect_all_freed(here)


def an_image_without_toc_becomes_an_ordinary_one() -> None:
    with node("life", images.ensure("demo")) as here:
        here.containerd.rpull(here.plain)
        expect(lazy_mounts(here) == 0, "a layer without TOC was mounted lazily")
        here.lazy = here.plain
        _say_hello(here)
        here.containerd.remove_image(here.plain)
        _expect_all_freed(here)


def an_ordinary_pull_through_holdfast_unpacks_normally() -> None:
    with node("life", images.ensure("every-object")) as here:
        here.containerd.pull(here.lazy, snapshotter="holdfast")
        expect(lazy_mounts(here) == 0, "plain `ctr pull` passes no labels, yet a layer is lazy")
        with here.containerd.mounted_view(here.image.esgz.chain_id, "holdfast") as view:
            expect((view / "changes/overwritten").read_bytes() == b"upper", "wrong content")
        here.containerd.remove_image(here.lazy)
        _expect_all_freed(here)


if __name__ == "__main__":
    Path(images.cache_folder()).mkdir(parents=True, exist_ok=True)
    sys.exit(
        run_steps(
            two_namespaces_pull_and_run_the_same_image,
            a_snapshot_committed_on_top_is_a_parent_like_any_other,
            a_running_container_reads_on_after_its_image_was_removed,
            a_container_whose_snapshots_were_deleted_under_it_reads_on,
            an_image_without_toc_becomes_an_ordinary_one,
            an_ordinary_pull_through_holdfast_unpacks_normally,
        )
    )
