#!/usr/bin/env python3
"""The worker must still start after `apt upgrade` replaced libraries under it: everything but libc, OpenSSL and libunwind is
linked statically (docs/HANDOVER.md), and soon: libcurl, which brings 30 more libraries, is loaded later (docs/adr/0004). Argument: the worker's binary."""
import re
import subprocess
import sys

ALLOWED = re.compile(r"^(libc|libm|libpthread|librt|libdl|libgcc_s|ld-linux-x86-64|libssl|libcrypto|libunwind)\.so")


def main():
    dynamic = subprocess.run(["readelf", "-d", "-W", sys.argv[1]], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    wrong = [library for library in needed if not ALLOWED.match(library)]
    print(f"must be linked statically: {', '.join(wrong)}" if wrong else f"links {', '.join(needed)}")
    return 1 if wrong or not needed else 0


if __name__ == "__main__":
    sys.exit(main())
