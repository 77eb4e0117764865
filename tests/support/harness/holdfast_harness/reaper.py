"""A detached process that waits for its standard input to close and then ends the instance whose folder it was given:
nothing stays behind even when a test is killed with SIGKILL. A word before the end of input dismisses it.

    python3 -m holdfast_harness.reaper ROOT < PIPE
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from . import teardown


def main(root: Path) -> None:
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)  # whoever reads our starter's output must not wait for us
    os.dup2(null, 1)
    os.dup2(null, 2)
    if os.read(0, 16) == b"":
        teardown.end_all(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
