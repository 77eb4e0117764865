#!/usr/bin/env python3
"""The supervisor stays small and ignorant: at most MAX_LINES lines of code (neither blank nor only a
comment, which a limit must not punish) without tests, and it links nothing but what DESIGN 3
allows. Arguments: source folder, supervisor binary."""
import pathlib
import re
import subprocess
import sys

MAX_LINES = 3872
# libc and its parts, the C++ runtime, systemd's client library, and libunwind with its lzma (glog's stack traces).
ALLOWED = re.compile(r"^(libc|libm|libpthread|librt|libdl|libgcc_s|libstdc\+\+|libsystemd|libunwind|ld-linux-x86-64)\.so")
ALLOWED_SANITIZERS = re.compile(r"^lib(asan|ubsan|tsan)\.so")
# A symbol of each library that must not be inside the binary.
FORBIDDEN_SYMBOLS = ("fuse_session_new", "leveldb::", "grpc::", "curl_easy", "nlohmann", "toml::", "SSL_CTX_new")


def supervisor_lines(root):
    total = 0
    for path in sorted((root / "supervisor").rglob("*")):
        if path.suffix in (".h", ".cc") and not path.name.endswith("_test.cc") and "testing" not in path.parts:
            lines = (line.strip() for line in path.read_text().splitlines())
            total += sum(1 for line in lines if line and not line.startswith("//"))
    return total


def main():
    root, binary = pathlib.Path(sys.argv[1]), sys.argv[2]
    problems = []
    lines = supervisor_lines(root)
    if not 0 < lines <= MAX_LINES:
        problems.append(f"supervisor/ has {lines} lines of code, {MAX_LINES} are allowed")
    dynamic = subprocess.run(["readelf", "-d", "-W", binary], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    for library in needed:
        if not ALLOWED.match(library) and not ALLOWED_SANITIZERS.match(library):
            problems.append(f"the supervisor links {library}")
    symbols = subprocess.run(["nm", "-C", "--defined-only", binary], check=True, capture_output=True, text=True).stdout
    for symbol in FORBIDDEN_SYMBOLS:
        if symbol in symbols:
            problems.append(f"the supervisor contains {symbol}")
    print("\n".join(problems) or f"{lines} lines of code, links {', '.join(needed)}")
    return 1 if problems or not needed else 0


if __name__ == "__main__":
    sys.exit(main())
