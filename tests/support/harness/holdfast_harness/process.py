"""Running programs with time limits, keeping daemons, and finding every process that belongs to an instance.

A process belongs to an instance when its environment carries the instance's marker, when it is a containerd shim whose
command line names the instance's folder, or when it descends from such a process. Nothing is ever looked up by name
alone, so other containerds on the machine are safe.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import HarnessError

MARKER = "HOLDFAST_INSTANCE"


def wait_for(what: str, condition: Callable[[], bool], seconds: float, interval: float = 0.05) -> None:
    """Polls `condition` until it holds; HarnessError when `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise HarnessError(f"{what}: not after {seconds:g} s")
        time.sleep(interval)


def run(
    command: Sequence[str | Path],
    timeout: float = 60,
    env: dict[str, str] | None = None,
    check: bool = True,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process group of its own, which is killed when `timeout` is over.

    With `log` the output goes to that file as it comes; otherwise it is returned.
    """
    words = [str(word) for word in command]
    sink = log.open("ab") if log else subprocess.PIPE
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT if log else subprocess.PIPE,
        env={**os.environ, **(env or {})},
        start_new_session=True,
        cwd=cwd,
    )
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except BaseException as error:
        kill_group(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise HarnessError(f"`{' '.join(words)}` took longer than {timeout:g} s") from None
        raise
    finally:
        if log:
            sink.close()  # type: ignore[union-attr]
    result = subprocess.CompletedProcess(words, process.returncode, _text(out), _text(err))
    if check and process.returncode != 0:
        end = tail(log) if log else (result.stderr or result.stdout)[-3000:]
        raise HarnessError(f"`{' '.join(words)}` ended with {process.returncode}:\n{end}")
    return result


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace")


def tail(path: Path | None, size: int = 3000) -> str:
    """The last `size` characters of a log file."""
    if path is None or not path.exists():
        return ""
    return path.read_bytes()[-size:].decode(errors="replace")


def kill_group(process: subprocess.Popen[bytes], patience: float = 5) -> None:
    """SIGKILL to the process group of `process`; gives up after `patience` (a dead FUSE mount can hold it)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass


class Daemon:
    """A background program with a log file. Carries the instance's marker in its environment."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        root: Path,
        env: dict[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ):
        self.name = name
        self._stop_signal = stop_signal
        self.log = root / "logs" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {}), MARKER: str(root)},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, condition: Callable[[], bool], seconds: float) -> None:
        """Waits for `condition`; fails at once, with the end of the log, when the program ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running():
                raise HarnessError(f"{self.name} ended with {self.process.returncode} while starting:\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise HarnessError(f"{self.name} was not ready after {seconds:g} s:\n{tail(self.log)}")
            time.sleep(0.03)

    def stop(self, patience: float = 15) -> int | None:
        """The stop signal, then SIGKILL when `patience` is over. The exit status, or None when it had to be killed."""
        if self.running():
            self.process.send_signal(self._stop_signal)
            try:
                return self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    pass
                return None
        return self.process.returncode


def parent_of(pid: int) -> int:
    """The parent's id, 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def alive(pid: int) -> bool:
    """True for a running process; false for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _belongs(pid: int, root: Path) -> bool:
    if f"{MARKER}={root}".encode() in _read(f"/proc/{pid}/environ").split(b"\0"):
        return True
    arguments = _read(f"/proc/{pid}/cmdline")
    return b"containerd-shim" in arguments.split(b"\0")[0] and f"{root}/".encode() in arguments


def processes_of(root: Path) -> list[int]:
    """Every process of the instance, children after their parents; never this process or its ancestors."""
    parents = {int(entry): parent_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    mine = set()
    walker = os.getpid()
    while walker > 1:
        mine.add(walker)
        walker = parents.get(walker) or parent_of(walker)
    found = [pid for pid in parents if pid not in mine and pid > 1 and _belongs(pid, root)]
    seen = set(found)
    for pid in found:  # grows while it is walked: children of children
        for child, parent in parents.items():
            if parent == pid and child not in seen and child not in mine:
                seen.add(child)
                found.append(child)
    return found


def kill_and_wait(pids: Iterable[int], patience: float = 5) -> list[int]:
    """SIGKILL to each; the ones that still live when `patience` is over."""
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    deadline = time.monotonic() + patience
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if alive(pid)]
        if left:
            time.sleep(0.02)
    return left
