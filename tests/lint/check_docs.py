#!/usr/bin/env python3
"""Every folder with code has a README.md, and every relative link in a Markdown file leads somewhere."""
import pathlib
import re
import subprocess
import sys

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def main():
    root = pathlib.Path(sys.argv[1])
    listed = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, text=True).stdout.splitlines()
    files = [pathlib.Path(name) for name in listed if (root / name).exists()]
    problems = []
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
