"""The demonstration behind scripts/quickstart: lazy against full pull, then a kill and an upgrade under a reader."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast_harness import Containerd, HarnessError, Holdfast, Instance, SlowProxy, images, mounts, teardown
from holdfast_harness.holdfast import binary
from holdfast_harness.instance import base_folder
from holdfast_harness.process import run

_FIRST_WORD = ["python3", "-c", 'import json,ssl,sqlite3; print("ok", flush=True)']
_DELAY_MS = 20
_TOOLS = ("containerd", "ctr", "ctr-remote", "runc", "docker-registry", "skopeo", "debootstrap", "unshare")
# What runc mounts over in every container.
_NOT_THE_IMAGES = ("dev/", "proc/", "run/", "sys/", "etc/hosts", "etc/resolv.conf", "etc/hostname")
_READ_LIMIT_S = 300
_DISK_NEEDED = 2 << 30


@dataclasses.dataclass
class Figures:
    """The keys of --json."""

    lazy_first_output_s: float = 0.0
    full_first_output_s: float = 0.0
    bytes_fetched: int = 0
    bytes_total: int = 0
    failed_reads: int = 0
    requests_carried_over: int = 0
    swap_pause_ms: float = 0.0


class Steps:
    """Numbered steps with their times."""

    def __init__(self, count: int):
        self._count = count
        self._number = 0
        self._begin = time.monotonic()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._number += 1
        print(f"== [{self._number}/{self._count}] {title}", flush=True)
        started = time.monotonic()
        yield
        print(f"   done in {time.monotonic() - started:.1f} s", flush=True)

    def say(self, text: str) -> None:
        print(f"   {time.monotonic() - self._begin:6.1f} s  {text}", flush=True)


@dataclasses.dataclass
class Stage:
    """All that runs."""

    box: Instance
    proxy: SlowProxy
    holdfast: Holdfast
    containerd: Containerd
    image: images.Image
    plain: str
    lazy: str


def _start(box: Instance, image: images.Image, steps: Steps) -> Stage:
    registry = box.registry(store=image.store, read_only=True)
    proxy = box.slow_proxy(registry.address)
    steps.say(f"docker-registry on {registry.address}, behind a counting proxy on {proxy.address}")
    holdfast = box.holdfast()
    steps.say(f"supervisor (pid {holdfast.supervisor_pid}) and worker (pid {holdfast.worker_pid()})")
    containerd = box.containerd(holdfast)
    steps.say(f"containerd on {containerd.socket}")
    return Stage(box, proxy, holdfast, containerd, image, *(image.reference(proxy.address, t) for t in ("gzip", "esgz")))


def _first_output(stage: Stage, reference: str, snapshotter: str) -> None:
    """Returns as soon as the container has spoken; then ends it."""
    process = stage.containerd.start_container(reference, _FIRST_WORD, snapshotter)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    if line.strip() != "ok":
        process.wait(30)
        raise HarnessError(f"the container did not start: {line}{process.stderr.read()}")


def _full(stage: Stage) -> float:
    started = time.monotonic()
    stage.containerd.pull(stage.plain)
    _first_output(stage, stage.plain, "overlayfs")
    return time.monotonic() - started


def _lazy(stage: Stage, steps: Steps) -> tuple[float, int]:
    before = stage.proxy.counters()["bytes"]
    started = time.monotonic()
    stage.containerd.rpull(stage.lazy)
    steps.say(f"the pull took {time.monotonic() - started:.2f} s")
    _first_output(stage, stage.lazy, "holdfast")
    took = time.monotonic() - started
    lazy_layers = len(mounts.fuse_mounts_below(stage.holdfast.state))
    if lazy_layers != len(stage.image.esgz.layers):
        raise HarnessError(f"only {lazy_layers} of {len(stage.image.esgz.layers)} layers are served lazily")
    return took, stage.proxy.counters()["bytes"] - before


def _write_manifest(stage: Stage) -> Path:
    """What every block of the image must be, taken from the ordinary unpack."""
    manifest = stage.box.root / "manifest"
    with stage.containerd.mounted_view(stage.image.gzip.chain_id, "overlayfs") as right:
        run([binary("holdfast-reader"), "manifest", right, manifest], timeout=120)
    lines = manifest.read_text(errors="surrogateescape").splitlines(keepends=True)
    kept = [line for line in lines if not line.split(" ", 2)[2].startswith(_NOT_THE_IMAGES)]
    manifest.write_text("".join(kept), errors="surrogateescape")
    return manifest


def _start_reader(stage: Stage, manifest: Path) -> subprocess.Popen[str]:
    options = ["--rm"]
    for source, target in ((binary("holdfast-reader"), "/holdfast-reader"), (manifest, "/holdfast-manifest")):
        options += ["--mount", f"type=bind,src={source},dst={target},options=rbind:ro"]
    argv = ["/holdfast-reader", "read", "/", "/holdfast-manifest", "--once", "--threads", "8"]
    return stage.containerd.start_container(stage.lazy, argv, "holdfast", options=options)


def _wait_for_traffic(stage: Stage, reader: subprocess.Popen[str], requests: int) -> None:
    """Until the reader has caused so many more requests."""
    goal = stage.proxy.counters()["requests"] + requests
    limit = time.monotonic() + 60
    while stage.proxy.counters()["requests"] < goal:
        if reader.poll() is not None:
            raise HarnessError("the reader ended before the worker could be replaced under it:" + reader.communicate()[1])
        if time.monotonic() > limit:
            raise HarnessError("the reader makes no progress: " + stage.holdfast.ctl("inflight", check=False).stdout)
        time.sleep(0.01)


def _disturb(stage: Stage, steps: Steps, figures: Figures) -> None:
    """Kill, then upgrade, while a container reads what was never read before."""
    manifest = _write_manifest(stage)
    stage.proxy.delay(_DELAY_MS)
    steps.say(f"the registry now answers {_DELAY_MS} ms late, so that requests are outstanding at any moment")
    reader = _start_reader(stage, manifest)
    steps.say("a container reads every block of the image, from 8 threads, and checks each")
    _wait_for_traffic(stage, reader, 100)
    killed = stage.holdfast.kill_worker()
    successor = stage.holdfast.wait_worker(unlike=killed)
    after_kill = stage.holdfast.carried_over()
    steps.say(f"SIGKILL to the worker (pid {killed}); pid {successor} took over {after_kill} requests")
    _wait_for_traffic(stage, reader, 100)
    swap = stage.holdfast.upgrade()
    if reader.poll() is not None:
        raise HarnessError("the reader ended before the upgrade was over: it proves nothing")
    figures.requests_carried_over = stage.holdfast.carried_over()
    figures.swap_pause_ms = round(swap["pause_ns"] / 1e6, 2)
    upgraded = swap["requests_carried_over"]
    steps.say(f"upgrade: pause {figures.swap_pause_ms} ms, {upgraded} requests carried over")
    _judge_reader(reader, steps, figures)


def _judge_reader(reader: subprocess.Popen[str], steps: Steps, figures: Figures) -> None:
    try:
        out, err = reader.communicate(timeout=_READ_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise HarnessError(f"the reader hangs ({_READ_LIMIT_S} s)") from None
    try:
        report = json.loads(out)
    except json.JSONDecodeError:
        raise HarnessError(f"the reader ended with {reader.returncode}: {err}") from None
    figures.failed_reads = int(report["failed"]) + (1 if report["corrupt_bytes"] else 0)
    steps.say(f"read {report['bytes'] >> 20} MiB: {report['failed']} failed, {report['corrupt_bytes']} corrupt bytes")
    if err:
        steps.say(err.strip())


def _print_table(figures: Figures) -> None:
    ratio = figures.full_first_output_s / figures.lazy_first_output_s
    share = 100 * figures.bytes_fetched / figures.bytes_total
    rows = [
        ("first output, full pull with overlayfs", f"{figures.full_first_output_s:.2f} s"),
        ("first output, lazy with holdfast", f"{figures.lazy_first_output_s:.2f} s  ({ratio:.1f} times sooner)"),
        ("fetched until then", f"{figures.bytes_fetched / 1e6:.1f} of {figures.bytes_total / 1e6:.1f} MB  ({share:.0f} %)"),
        ("failed or corrupt reads in kill and upgrade", f"{figures.failed_reads}"),
        ("requests carried over", f"{figures.requests_carried_over}"),
        ("pause of the upgrade", f"{figures.swap_pause_ms:.1f} ms"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<46}{value}")
    print()


def _broken_promises(figures: Figures) -> list[str]:
    found = []
    if figures.failed_reads:
        found.append(f"{figures.failed_reads} reads failed")
    if figures.requests_carried_over == 0:
        found.append("no request was carried over")
    if figures.lazy_first_output_s >= figures.full_first_output_s:
        found.append("the lazy start was not sooner than the full pull")
    return found


def _explain_kept(stage: Stage) -> None:
    ctl = " ".join(stage.holdfast.ctl_command("status"))
    shell = " ".join(stage.containerd.run_command(stage.lazy, "try", ["sh"], options=("--rm", "--tty")))
    pull = " ".join(stage.containerd.command("images", "rpull", "--plain-http", "--snapshotter", "holdfast", stage.lazy,
                                             remote=True))  # fmt: skip
    stage.proxy.delay(0)
    stage.box.keep()
    print("Everything is still running. As root:")
    print(f"  look at it        {ctl}\n                    (and mounts, layers, snapshots, inflight, upgrade --force)")
    print(f"  another container {shell}\n  pull again        {pull}")
    print(f"  logs              {stage.box.root}/logs\n  end it            scripts/quickstart --end {stage.box.root}")


def _demonstrate(keep: bool, figures: Figures) -> None:
    steps = Steps(5)
    with steps.step("demo image: Debian with python3, four layers, as gzip and as eStargz"):
        image = images.ensure("demo", steps.say)
    figures.bytes_total = image.esgz.bytes
    with Instance("quickstart") as box:
        with steps.step("start a private registry, holdfast and containerd"):
            stage = _start(box, image, steps)
        with steps.step("full pull of the gzip image with overlayfs, then python3"):
            figures.full_first_output_s = round(_full(stage), 3)
        with steps.step("lazy pull of the eStargz image with holdfast, then python3"):
            figures.lazy_first_output_s, figures.bytes_fetched = _lazy(stage, steps)
            figures.lazy_first_output_s = round(figures.lazy_first_output_s, 3)
        with steps.step("kill the worker, then upgrade it, under a reading container"):
            _disturb(stage, steps, figures)
        _print_table(figures)
        if keep:
            _explain_kept(stage)


def _end(folders: list[str]) -> int:
    kept = [Path(folder) for folder in folders] or sorted(base_folder().glob("hf-quickstart-*"))
    for folder in kept:
        if not folder.name.startswith("hf-quickstart-") or not folder.is_dir():
            print(f"quickstart: {folder} is not the folder of a kept quickstart", file=sys.stderr)
            return 2
        problems = teardown.end_all(folder)
        print(f"{folder}: " + ("; ".join(problems) or "ended, nothing is left"))
        if problems:
            return 1
    if not kept:
        print("nothing to end")
    return 0


def _check_machine() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise HarnessError(f"not installed: {', '.join(missing)} (sudo scripts/install-deps)")
    free = shutil.disk_usage(base_folder()).free
    if free < _DISK_NEEDED:
        raise HarnessError(f"{base_folder()} has {free >> 20} MiB free, {_DISK_NEEDED >> 20} MiB are needed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--end", nargs="*", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    if options.end is not None:
        return _end(options.end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended on the way out
    figures = Figures()
    try:
        _check_machine()
        _demonstrate(options.keep, figures)
    except HarnessError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; everything was ended", file=sys.stderr)
        return 130
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(figures), indent=2) + "\n")
    broken = _broken_promises(figures)
    for promise in broken:
        print(f"quickstart: {promise}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
