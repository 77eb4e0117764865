#!/usr/bin/env python3
"""Runs a test program of a sanitized build. What a sanitizer reports in any of its processes fails the test.

usage: sanitized_run.py PROGRAM [ARGUMENT...]

Exit codes do not tell enough: a worker or verifier that reports and ends looks like any other that died, and is replaced;
what it prints goes where the supervisor's output goes. So every process writes its reports to a file of a folder that this
script looks into: shown as soon as they are there, beside the name of the test that ran. The environment's own
*SAN_OPTIONS come last and win.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

SUPPRESSIONS = pathlib.Path(__file__).resolve().parent.parent / "tsan.supp"
OPTIONS = {
    # A long history: a report whose other stack is lost matches no suppression. The worker ends with its threads unjoined.
    "TSAN_OPTIONS": f"halt_on_error=1:history_size=7:report_thread_leaks=0:suppressions={SUPPRESSIONS}",
    "ASAN_OPTIONS": "",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "LSAN_OPTIONS": "",
}


class Reports:
    def __init__(self, folder):
        self.folder = folder
        self.shown = {}  # file name -> bytes already shown

    def show_new(self):
        for path in sorted(self.folder.iterdir()):
            text = path.read_bytes()
            new = text[self.shown.get(path.name, 0):]
            if new:
                self.shown[path.name] = len(text)
                sys.stderr.write(f"--- {path.name}\n{new.decode(errors='replace')}\n")
                sys.stderr.flush()


def main():
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = pathlib.Path(tempfile.mkdtemp(prefix="holdfast-reports-"))
    folder.chmod(0o777)
    environment = dict(os.environ)
    for name, options in OPTIONS.items():
        # Without the note of the suppressions that were used: it would look like a report.
        given = [options, f"print_suppressions=0:log_path={folder}/report", os.environ.get(name, "")]
        environment[name] = ":".join(option for option in given if option)
    reports = Reports(folder)
    try:
        program = subprocess.Popen(sys.argv[1:], env=environment)
        while program.poll() is None:
            reports.show_new()
            time.sleep(0.1)
        reports.show_new()
        if reports.shown:
            print(f"sanitized_run: {len(reports.shown)} processes reported (above), the test has failed", file=sys.stderr)
            return 1
        return program.returncode if program.returncode >= 0 else 128 - program.returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
