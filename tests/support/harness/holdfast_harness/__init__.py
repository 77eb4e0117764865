"""Private instances of containerd, docker-registry and holdfast for tests, benches and the quickstart.

Start with `Instance` (instance.py). Standard library only.
"""

from .containerd import Containerd
from .errors import HarnessError
from .holdfast import Holdfast
from .instance import Instance
from .registry import Registry, SlowProxy

__all__ = ["Containerd", "HarnessError", "Holdfast", "Instance", "Registry", "SlowProxy"]
