"""A private holdfast: supervisor and worker with their own state, sockets and configuration; and holdfastctl."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HarnessError
from .process import alive, run, wait_for

if TYPE_CHECKING:
    from .instance import Instance


def source_folder() -> Path:
    """The repository."""
    return Path(os.environ.get("HOLDFAST_SOURCE") or Path(__file__).parents[4])


def binary(name: str) -> Path:
    """A program of the build under test: $HOLDFAST_BIN, else build/release or build/dev."""
    folders = [source_folder() / "build" / preset / "bin" for preset in ("release", "dev")]
    if "HOLDFAST_BIN" in os.environ:
        folders = [Path(os.environ["HOLDFAST_BIN"])]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise HarnessError(f"{name} is not built: run scripts/build (looked in {', '.join(map(str, folders))})")


class Holdfast:
    """`config` is the text of the worker's configuration file, `options` are further words for the supervisor."""

    def __init__(
        self,
        box: Instance,
        config: str = "",
        name: str = "holdfast",
        env: dict[str, str] | None = None,
        options: Sequence[str] = (),
    ):
        self._box = box
        self._options = list(options)
        self._env = env
        self._name = name
        self.state = box.root / name / "state"
        self.runtime = box.root / name / "run"
        self.state.mkdir(parents=True, mode=0o700)
        self.runtime.mkdir(mode=0o700)
        self.snapshotter_socket = self.runtime / "snapshotter.sock"
        self.control_socket = self.runtime / "supervisor.sock"
        self.config = box.root / name / "config.toml"
        self.config.write_text(config)
        self.start()

    def start(self, timeout: float = 30) -> None:
        """Starts supervisor and worker on the state that is there; returns when the snapshots service answers."""
        command = [binary("holdfast-supervisor"), "--worker", binary("holdfast-worker"), "--state", self.state]
        command += ["--runtime", self.runtime, "--snapshotter-socket", self.snapshotter_socket]
        command += ["--control-socket", self.control_socket, *self._options]
        command += ["--", "--config", self.config]
        self._daemon = self._box.daemon(self._name, command, self._env, signal.SIGINT)  # the end of everything
        self._daemon.wait_ready(self._serving, timeout)

    def stop(self) -> None:
        """SIGINT to the supervisor, which ends the worker and unmounts."""
        status = self._daemon.stop(patience=20)
        if status != 0:
            raise HarnessError(f"the supervisor ended with {status} on SIGINT")

    def wait_end(self, seconds: float = 10) -> None:
        """After a kill: waits until the supervisor is gone."""
        wait_for("the supervisor's end", lambda: not self._daemon.running(), seconds)

    @property
    def log(self) -> Path:
        """Of the supervisor and of its workers."""
        return self._daemon.log

    @property
    def supervisor_pid(self) -> int:
        return self._daemon.pid

    def _serving(self) -> bool:
        if not self.control_socket.exists():
            return False
        try:
            return self.worker_pid() > 0
        except (HarnessError, json.JSONDecodeError):
            return False

    def ctl_command(self, *words: str | Path) -> list[str]:
        return [str(binary("holdfastctl")), "--socket", str(self.control_socket), *map(str, words)]

    def ctl(self, *words: str | Path, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.ctl_command(*words), timeout=timeout, check=check)

    def ctl_json(self, *words: str | Path, timeout: float = 60) -> Any:
        return json.loads(self.ctl("--json", *words, timeout=timeout).stdout)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ctl_json("status", timeout=20)
        return status

    def worker_pid(self) -> int:
        """The serving worker's process id; 0 while there is none."""
        for worker in self.status()["workers"]:
            if worker["role"] == "owner":
                return int(worker["pid"])
        return 0

    def carried_over(self) -> int:
        """Requests found unanswered in dead or parked workers' ledgers since the supervisor started."""
        return int(self.status()["requests_carried_over_total"])

    def kill_worker(self) -> int:
        """SIGKILL to the worker. Returns its former pid at once; `wait_worker` waits for the successor."""
        pid = self.worker_pid()
        if pid:
            os.kill(pid, signal.SIGKILL)
        return pid

    def wait_worker(self, unlike: int, seconds: float = 20) -> int:
        """Waits until a worker other than `unlike` serves; its pid."""
        wait_for("a new worker", lambda: self.worker_pid() not in (0, unlike) and not alive(unlike), seconds)
        return self.worker_pid()

    def upgrade(self, timeout: float = 60) -> dict[str, Any]:
        """Swaps to the running build again. The swap: result, pause_ns, requests_carried_over, ..."""
        swap: dict[str, Any] = self.ctl_json("upgrade", "--force", timeout=timeout)["swap"]
        return swap
