#!/usr/bin/env python3
"""Checks that includes follow tests/lint/layers.txt: the arrows of docs/ARCHITECTURE.md, and which folder may use
which library. Test code (*_test.cc, testing/, fuzz/) may include what it tests against."""
import pathlib
import re
import sys

INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]')


def read_rules(path):
    allowed, libraries, section = {}, [], "folders"
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        if line == "[libraries]":
            section = "libraries"
            continue
        left, right = line.rsplit(":", 1)
        if section == "folders":
            allowed[left] = right.split()
        else:
            libraries.append((left.split(), right.split()))
    return allowed, libraries


def folder_of(relative, folders):
    best = ""
    for folder in folders:
        if relative.startswith(folder + "/") and len(folder) > len(best):
            best = folder
    return best


def is_test(path):
    return path.name.endswith("_test.cc") or "testing" in path.parts or "fuzz" in path.parts or path.name == "test_main.cc"


def check_include(where, folder, target, allowed, libraries):
    target_folder = folder_of(target, allowed)
    rules = allowed[folder]
    if target_folder and target_folder != folder and "*" not in rules and target_folder not in rules:
        return [f"{where}: {folder} may not include {target_folder}"]
    problems = []
    for prefixes, users in libraries:
        if any(target.startswith(prefix) for prefix in prefixes) and folder not in users:
            problems.append(f"{where}: {folder} may not include {target} (only {', '.join(users)})")
    return problems


def main():
    root = pathlib.Path(sys.argv[1])
    allowed, libraries = read_rules(root / "tests/lint/layers.txt")
    problems, files = [], 0
    for top in ("common", "schema", "supervisor", "verifier", "worker"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in (".h", ".cc", ".c") or is_test(path):
                continue
            files += 1
            relative = str(path.relative_to(root))
            folder = folder_of(relative, allowed)
            if not folder:
                problems.append(f"{relative}: its folder is not in tests/lint/layers.txt")
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                match = INCLUDE.match(line)
                if match:
                    problems += check_include(f"{relative}:{number}", folder, match.group(1), allowed, libraries)
    print("\n".join(problems) or f"{files} files follow the rules")
    return 1 if problems or files == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
