"""What the e2e tests share: the harness on the path, an instance with everything running, and plain assertions."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support" / "harness"))

from holdfast_harness import Containerd, HarnessError, Holdfast, Instance, Registry, SlowProxy  # noqa: E402
from holdfast_harness.images import Image  # noqa: E402


@dataclass
class Node:
    """A machine in small: registry, proxy before it, holdfast, containerd. `lazy` and `plain` are image references."""

    box: Instance
    registry: Registry
    proxy: SlowProxy
    holdfast: Holdfast
    containerd: Containerd
    image: Image
    lazy: str
    plain: str


@contextlib.contextmanager
def node(name: str, image: Image, delay_ms: float = 0, config: str = "") -> Iterator[Node]:
    with Instance(name) as box:
        registry = box.registry(store=image.store, read_only=True)
        proxy = box.slow_proxy(registry.address, delay_ms=delay_ms)
        holdfast = box.holdfast(config=config)
        containerd = box.containerd(holdfast)
        lazy, plain = (image.reference(proxy.address, tag) for tag in ("esgz", "gzip"))
        yield Node(box, registry, proxy, holdfast, containerd, image, lazy, plain)


def expect(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def lazy_mounts(node: Node) -> int:
    """FUSE mounts of the instance, by the kernel's own list."""
    from holdfast_harness import mounts

    return len(mounts.fuse_mounts_below(node.holdfast.state))


def run_steps(*steps: Callable[[], None]) -> int:
    """Runs each test function; says what it does, how long it took, and what failed. The exit status."""
    failed = 0
    for step in steps:
        started = time.monotonic()
        print(f"[ RUN  ] {step.__name__}", flush=True)
        try:
            step()
            verdict = "[   OK ]"
        except (AssertionError, HarnessError, OSError, KeyError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            verdict, failed = "[FAILED]", failed + 1
        print(f"{verdict} {step.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
    return 1 if failed else 0


def setting(name: str, default: int) -> int:
    """A whole number from the environment."""
    return int(os.environ.get(name, default))
