"""docker-registry on a loopback port, and a proxy before it that makes every answer late, counts bytes or holds them."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .instance import free_port
from .process import wait_for

if TYPE_CHECKING:
    from .instance import Instance

_MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Registry:
    """`store` is the folder of its content; `users` (name -> password) asks for basic auth."""

    def __init__(
        self, box: Instance, store: Path | None = None, read_only: bool = False, users: dict[str, str] | None = None
    ):
        self._box = box
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.store = store or box.root / "registry"
        self._config = box.root / f"registry-{self.port}.json"
        self._config.write_text(json.dumps(self._settings(read_only, users)))  # JSON is YAML
        self.start()

    def _settings(self, read_only: bool, users: dict[str, str] | None) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.store)},
                "cache": {"blobdescriptor": "inmemory"},
                "maintenance": {"readonly": {"enabled": read_only}, "uploadpurging": {"enabled": False}},
            },
            "http": {"addr": self.address, "relativeurls": True},
        }
        if users:
            passwords = self._box.root / f"htpasswd-{self.port}"
            passwords.write_text("".join(f"{name}:{_bcrypt(word)}\n" for name, word in users.items()))
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(passwords)}}
        return settings

    def start(self) -> None:
        self._daemon = self._box.daemon("registry", ["docker-registry", "serve", self._config])
        self._daemon.wait_ready(lambda: _listening(self.port), 20)

    def stop(self) -> None:
        self._daemon.stop(patience=3)


def _bcrypt(password: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import crypt

        return crypt.crypt(password, crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16))


def get_json(address: str, path: str) -> dict[str, Any]:
    """One JSON document of a registry's API, e.g. path "demo/manifests/esgz"."""
    request = urllib.request.Request(f"http://{address}/v2/{path}", headers={"Accept": _MANIFESTS})
    with urllib.request.urlopen(request, timeout=20) as answer:
        document: dict[str, Any] = json.load(answer)
        return document


class SlowProxy:
    """TCP proxy in a process of its own (slow_proxy.py). `address` is what image references name."""

    def __init__(self, box: Instance, upstream: str, delay_ms: float = 0):
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._control = box.root / f"proxy-{self.port}.sock"
        program = Path(__file__).with_name("slow_proxy.py")
        self.ranges = box.root / f"proxy-{self.port}.ranges"  # slow_proxy.py says what is in it
        command = [sys.executable, program, str(self.port), upstream, str(self._control), str(self.ranges)]
        box.daemon("proxy", command).wait_ready(self._answers, 20)
        if delay_ms:
            self.delay(delay_ms)

    def _answers(self) -> bool:
        try:
            return _listening(self.port) and bool(self.counters())
        except OSError:  # the socket's file is there before anybody listens
            return False

    def _ask(self, **words: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(10)
            control.connect(str(self._control))
            control.sendall(json.dumps(words).encode() + b"\n")
            with control.makefile() as answer:
                reply: dict[str, Any] = json.loads(answer.readline())
                return reply

    def delay(self, milliseconds: float) -> None:
        """Every request is passed on this much later."""
        self._ask(delay_ms=milliseconds)

    def hold(self, holding: bool = True) -> None:
        """While holding, requests are taken and kept: a registry that does not answer."""
        self._ask(hold=holding)

    def counters(self) -> dict[str, int]:
        """`requests` that came, `bytes` of answers passed back, and of the requests: those `delayed` and those `held` now."""
        return {key: int(value) for key, value in self._ask().items()}

    def wait_held(self, count: int, seconds: float = 30) -> None:
        wait_for(f"{count} requests at the held registry", lambda: self.counters()["held"] >= count, seconds)
