"""Makes the test images that are not in the cache yet. See scripts/make-demo-image."""

from __future__ import annotations

import sys

from holdfast_harness import HarnessError, images


def main() -> int:
    try:
        for name in sys.argv[1:] or ["demo", "every-object"]:
            image = images.ensure(name, print)
            print(f"{name}: {image.gzip.bytes >> 20} MiB as gzip, {image.esgz.bytes >> 20} MiB as eStargz, {image.store}")
    except HarnessError as error:
        print(f"make-demo-image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
