#!/usr/bin/env python3
"""Every folder with code has a README.md, every relative link in a Markdown file leads somewhere, and docs/FAILURES.md
lists exactly the fault points that the code has; tests that docs/HANDOVER.md names exist."""
import pathlib
import re
import subprocess
import sys

FAULT_POINT = re.compile(r'(?:PassFault\([^,]+,|Pass\()\s*"([a-z_]+\.[a-z_.]+)"')
LISTED_POINT = re.compile(r"^\| `([a-z_]+\.[a-z_.]+)` \|", re.MULTILINE)
TEST = re.compile(r"^TEST(?:_F|_P)?\((\w+),\s*(\w+)\)", re.MULTILINE)
NAMED_TEST = re.compile(r"`([A-Z]\w+)\.([A-Z]\w+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def fault_point_problems(root, files):
    used = set()
    for path in files:
        if path.suffix in (".cc", ".h") and not path.name.endswith("_test.cc") and path.parts[0] in ("supervisor", "worker"):
            used |= set(FAULT_POINT.findall((root / path).read_text()))
    listed = set(LISTED_POINT.findall((root / "docs/FAILURES.md").read_text()))
    problems = [f"docs/FAILURES.md does not list the fault point {name}" for name in sorted(used - listed)]
    problems += [f"docs/FAILURES.md lists {name}, which no code passes" for name in sorted(listed - used)]
    return problems if used else ["no fault point found in the code"]


def named_test_problems(root, files):
    tests = set()
    for path in files:
        if path.name.endswith("_test.cc"):
            tests |= set(TEST.findall((root / path).read_text()))
    named = set(NAMED_TEST.findall((root / "docs/HANDOVER.md").read_text()))
    problems = [f"docs/HANDOVER.md names the test {suite}.{test}, which does not exist" for suite, test in sorted(named - tests)]
    return problems if named else ["docs/HANDOVER.md names no test"]


def main():
    root = pathlib.Path(sys.argv[1])
    listed = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, text=True).stdout.splitlines()
    files = [pathlib.Path(name) for name in listed if (root / name).exists()]
    problems = fault_point_problems(root, files) + named_test_problems(root, files)
    for folder in sorted({path.parent for path in files if path.suffix in (".cc", ".capnp")}):
        if folder.name in ("testing", "fuzz"):
            continue
        if not (root / folder / "README.md").exists():
            problems.append(f"{folder}/ has no README.md")
    markdown = [path for path in files if path.suffix == ".md"]
    for path in markdown:
        for target in LINK.findall((root / path).read_text()):
            if "://" not in target and not (root / path.parent / target).exists():
                problems.append(f"{path}: {target} does not exist")
    print("\n".join(problems) or f"{len(markdown)} pages checked")
    return 1 if problems or not markdown else 0


if __name__ == "__main__":
    sys.exit(main())
