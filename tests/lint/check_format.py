#!/usr/bin/env python3
"""Every C++ file is formatted as .clang-format says. Mend with: clang-format-14 -i FILE. Argument: source folder."""
import os
import pathlib
import shutil
import subprocess
import sys


def main():
    root = pathlib.Path(sys.argv[1])
    program = shutil.which("clang-format-14") or shutil.which("clang-format")
    if program is None:
        print("clang-format is missing (scripts/install-deps installs it)")
        return 1
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "*.cc", "*.h", "*.c"], check=True, capture_output=True, text=True)
    files = [str(root / name) for name in listed.stdout.splitlines() if os.path.exists(root / name)]
    result = subprocess.run([program, "--dry-run", "-Werror", "--ferror-limit=1", *files], capture_output=True, text=True)
    wrong = [line for line in result.stderr.splitlines() if "error:" in line]
    print("\n".join(wrong) or f"{len(files)} files are formatted")
    return 1 if result.returncode != 0 or not files else 0


if __name__ == "__main__":
    sys.exit(main())
