"""The harness itself, without holdfast: above all that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from e2e_support import expect, run_steps
from holdfast_harness import Instance, demo_image, images, mounts, oci_layout, process, tree
from holdfast_harness.process import wait_for
from holdfast_harness.refetched import refetched_bytes

_KILLED = """
import sys, time
from e2e_support import *
from holdfast_harness import images
image = images.ensure("demo")
box = Instance("killed")
registry = box.registry(store=image.store, read_only=True)
containerd = box.containerd()
reference = image.reference(registry.address, "gzip")
containerd.pull(reference)
containerd.run(reference, ["sleep", "1000"], snapshotter="overlayfs", options=("--detach",), name="sleeper")
print(box.root, flush=True)
time.sleep(1000)
"""


def an_instance_is_gone_even_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _KILLED], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    root = Path(owner.stdout.readline().strip())
    expect(root.is_dir() and root.name.startswith("hf-killed-"), f"no instance: {root}")
    started = process.processes_of(root)
    names = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started)
    expect(all(name in names for name in (b"docker-registry", b"containerd-shim", b"sleep")), f"not all found: {names!r}")
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    wait_for("the end of the folder", lambda: not root.exists(), 30)
    expect(not any(process.alive(pid) for pid in started), "a process is left")
    expect(not mounts.mounts_below(root), "a mount is left")
    expect(not list(Path("/sys/fs/cgroup").glob(f"*/{root.name}")), "a cgroup is left")


def a_failing_block_leaves_nothing() -> None:
    root = Path()
    try:
        with Instance("fail") as box:
            root = box.root
            box.registry()
            (root / "mnt").mkdir()
            process.run(["mount", "-t", "tmpfs", "none", root / "mnt"])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    expect(root.name.startswith("hf-fail-") and not root.exists() and not process.processes_of(root), f"{root} is left")


def the_proxy_counts_delays_and_holds() -> None:
    with Instance("proxy") as box:
        registry = box.registry()
        proxy = box.slow_proxy(registry.address)
        url = f"http://{proxy.address}/v2/"
        urllib.request.urlopen(url, timeout=10).read()
        expect(proxy.counters()["requests"] == 1 and proxy.counters()["bytes"] > 20, f"{proxy.counters()}")
        proxy.delay(300)
        started = time.monotonic()
        urllib.request.urlopen(url, timeout=10).read()
        expect(time.monotonic() - started >= 0.3, "the answer was not late")
        proxy.delay(0)
        proxy.hold()
        waiting = subprocess.Popen([sys.executable, "-c", f"import urllib.request as u; u.urlopen({url!r}).read()"])
        proxy.wait_held(1)
        expect(waiting.poll() is None, "a held request was answered")
        proxy.hold(False)
        expect(waiting.wait(10) == 0, "a released request was not answered")


def the_proxy_notes_when_a_range_was_asked_for_and_when_answered() -> None:
    image = images.ensure("demo")
    blob = image.gzip.layers[0]
    with Instance("ranges") as box:
        registry = box.registry(store=image.store, read_only=True)
        proxy = box.slow_proxy(registry.address, delay_ms=200)
        name = image.reference("", "gzip").strip("/").rpartition(":")[0]
        request = urllib.request.Request(f"http://{proxy.address}/v2/{name}/blobs/{blob}", headers={"Range": "bytes=10-5009"})
        begin = time.monotonic_ns()
        expect(len(urllib.request.urlopen(request, timeout=10).read()) == 5000, "another length")
        end = time.monotonic_ns()
        wait_for("both lines", lambda: len(proxy.ranges.read_text().splitlines()) == 2, 10)
        asked, answered = (line.split(" ", 2) for line in proxy.ranges.read_text().splitlines())
        expect((asked[1], answered[1]) == ("asked", "answered"), f"{asked} {answered}")
        expect(asked[2] == answered[2] == f"{blob} 10 5009", f"{asked} {answered}")
        expect(begin < int(asked[0]) < int(answered[0]) - 200_000_000 < end, f"{asked} {answered}")


def what_was_stored_is_told_from_what_was_under_way() -> None:
    def fetched_again(answered: float, again: float, *gone: tuple[float, float]) -> int:
        def ns(seconds: float) -> int:
            return round(seconds * 1e9)

        lines = ["0 asked b 0 99"] + ([f"{ns(answered)} answered b 0 99"] if answered else [])
        lines += [f"{ns(again)} asked other 0 99", f"{ns(again)} asked b 90 199"]
        return refetched_bytes(lines, [(ns(begin), ns(end)) for begin, end in gone])

    expect(fetched_again(1, 9) == 10, "stored, and asked for again")
    expect(fetched_again(1, 9, (1.6, 6)) == 10, "stored before the worker stopped")
    expect(fetched_again(1, 9, (0.1, 0.9)) == 10, "answered to the next worker")
    expect(fetched_again(1, 1.4) == 0, "perhaps not stored yet")
    expect(fetched_again(0, 9) == 0, "never answered")
    expect(fetched_again(1, 9, (1.4, 6)) == 0, "perhaps not stored when the worker stopped")
    expect(fetched_again(3, 9, (2, 6)) == 0, "passed to a worker that stood still")


def a_registry_with_users_asks_for_the_password() -> None:
    with Instance("auth") as box:
        registry = box.registry(users={"alice": "secret"})
        url = f"http://{registry.address}/v2/"
        try:
            urllib.request.urlopen(url, timeout=10)
            raise AssertionError("served without a password")
        except urllib.error.HTTPError as error:
            expect(error.code == 401, f"{error.code}")
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, url, "alice", "secret")
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(passwords))
        expect(opener.open(url, timeout=10).status == 200, "the right password is refused")


def the_oracle_sees_every_kind_of_difference() -> None:
    with Instance("tree") as box:
        left, right = box.root / "left", box.root / "right"
        for root in (left, right):
            root.mkdir()
            for name in ("same", "bytes", "mode", "owner", "time", "xattr"):
                (root / name).write_text("word")
                os.utime(root / name, (1000, 1000))
            (root / "link").symlink_to("same")
            os.mknod(root / "device", 0o020600, os.makedev(1, 3))
        (right / "bytes").write_text("wOrd")
        os.utime(right / "bytes", (1000, 1000))
        os.chmod(right / "mode", 0o600)
        os.chown(right / "owner", 1, 2)
        os.utime(right / "time", (1000, 1001))
        os.setxattr(right / "xattr", "user.a", b"b")
        (right / "link").unlink()
        (right / "link").symlink_to("other")
        (right / "device").unlink()
        os.mknod(right / "device", 0o020600, os.makedev(1, 5))
        (left / "missing").mkdir()
        os.link(right / "same", right / "extra")
        ignored = frozenset((".", "link", "device"))
        found = {line.split("'")[1] for line in tree.differences(tree.read_tree(left), tree.read_tree(right), ignored)}
        wanted = {"bytes", "mode", "owner", "time", "xattr", "link", "device", "missing", "extra", "same"}
        expect(found == wanted, f"found {found}, must be {wanted}")


def apt_sources_are_read_in_both_forms() -> None:
    lines = "# deb http://no/ x main\ndeb [arch=amd64 signed-by=/k.gpg] http://one/debian bookworm main contrib\n"
    expect(demo_image._one_line_sources(lines) == [("http://one/debian", "bookworm", "main contrib", "/k.gpg")], "list")
    stanza = "Types: deb deb-src\nURIs: http://two/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
    wanted = [("http://two/debian", suite, "main", None) for suite in ("bookworm", "bookworm-updates")]
    expect(demo_image._deb822_sources(stanza) == wanted, "deb822")


def implied_directories_are_found_layer_by_layer() -> None:
    image = images.ensure("every-object")
    blobs = image.store / "docker/registry/v2/blobs/sha256"
    layers = [blobs / digest[7:9] / digest[7:] / "data" for digest in image.gzip.layers]
    found = oci_layout.implied_directories(layers)
    expect({"implied", "implied/inner", "nothing-below/inner", "changes"} <= found, f"found {found}")
    expect("kinds" not in found and "changes/opaque-late" not in found, f"found too much: {found}")


if __name__ == "__main__":
    sys.exit(
        run_steps(
            an_instance_is_gone_even_when_its_owner_is_killed,
            a_failing_block_leaves_nothing,
            the_proxy_counts_delays_and_holds,
            the_proxy_notes_when_a_range_was_asked_for_and_when_answered,
            what_was_stored_is_told_from_what_was_under_way,
            a_registry_with_users_asks_for_the_password,
            the_oracle_sees_every_kind_of_difference,
            apt_sources_are_read_in_both_forms,
            implied_directories_are_found_layer_by_layer,
        )
    )
