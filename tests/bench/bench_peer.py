"""The newest stargz-snapshotter beside holdfast, built from its Go module (tests/compat/stargz). Needs Go."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support" / "harness"))
from holdfast_harness.holdfast import source_folder  # noqa: E402
from holdfast_harness.images import cache_folder  # noqa: E402
from holdfast_harness.instance import Instance  # noqa: E402
from holdfast_harness.process import run  # noqa: E402


def build() -> Path | None:
    """The peer's program; None where Go is missing."""
    if not shutil.which("go"):
        return None
    program = cache_folder() / "stargz-peer"
    program.parent.mkdir(parents=True, exist_ok=True)
    run(["go", "build", "-o", program, "."], cwd=source_folder() / "tests/compat/stargz", timeout=900)
    return program


class StargzPeer:
    """A running peer; `snapshotter_socket` is where containerd finds it."""

    def __init__(self, box: Instance, program: Path, plain_http_host: str):
        root = box.root / "stargz"
        root.mkdir()
        self.snapshotter_socket = root / "stargz.sock"
        config = root / "config.json"
        mirror = {"host": plain_http_host, "insecure": True}
        config.write_text(
            json.dumps({"no_prometheus": True, "resolver": {"host": {plain_http_host: {"mirrors": [mirror]}}}})
        )
        command = [program, "-address", self.snapshotter_socket, "-root", root / "root", "-config", config]
        box.daemon("stargz", command).wait_ready(self.snapshotter_socket.exists, 20)
