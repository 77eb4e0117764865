"""A private containerd (1.6, Debian's) and its clients ctr and ctr-remote."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import mounts
from .errors import HarnessError
from .process import MARKER, run, wait_for

if TYPE_CHECKING:
    from .holdfast import Holdfast
    from .instance import Instance

_CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
{cri}
{proxy}
"""

_PROXY = """\
[proxy_plugins.holdfast]
  type = "snapshot"
  address = "{socket}"
"""

_CRI = """\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/cni-bin"
    conf_dir = "{root}/cni-conf"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{root}/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{root}/runc"
"""

_UNUSED = [
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
]


class Containerd:
    """Own root, state, sockets. With `sandbox_image` also its CRI plugin, on `socket`, with `snapshotter`."""

    def __init__(
        self,
        box: Instance,
        holdfast: Holdfast | None = None,
        sandbox_image: str | None = None,
        snapshotter: str = "holdfast",
    ):
        self._box = box
        self.root = box.root / "containerd"
        self.root.mkdir(mode=0o711)
        self.socket = self.root / "containerd.sock"
        self._config = self.root / "config.toml"
        unused = _UNUSED if sandbox_image else [*_UNUSED, "io.containerd.grpc.v1.cri"]
        cri = ""
        if sandbox_image:
            cri = _CRI.format(root=self.root, sandbox_image=sandbox_image, snapshotter=snapshotter)
        self._config.write_text(
            _CONFIG.format(
                root=self.root,
                socket=self.socket,
                disabled=", ".join(f'"{name}"' for name in unused),
                cri=cri,
                proxy=_PROXY.format(socket=holdfast.snapshotter_socket) if holdfast else "",
            )
        )
        self._names = itertools.count()
        self.start()

    def start(self) -> None:
        # The folder of the shims' sockets is fixed in containerd; it wants its parent to be there.
        self._daemon = self._box.daemon("containerd", ["containerd", "--config", self._config, "--log-level", "info"])
        self._daemon.wait_ready(self._answers, 30)

    def stop(self) -> None:
        self._daemon.stop()

    def _answers(self) -> bool:
        return self.socket.exists() and self.ctr("version", check=False, timeout=10).returncode == 0

    def command(self, *words: str | Path, namespace: str | None = None, remote: bool = False) -> list[str]:
        """The argument vector of a ctr (or ctr-remote) call."""
        program = "ctr-remote" if remote else "ctr"
        return [program, "--address", str(self.socket), "--namespace", namespace or self._box.namespace, *map(str, words)]

    def ctr(
        self,
        *words: str | Path,
        namespace: str | None = None,
        remote: bool = False,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        return run(self.command(*words, namespace=namespace, remote=remote), timeout=timeout, check=check)

    def pull(self, image: str, snapshotter: str = "overlayfs", namespace: str | None = None, timeout: float = 300) -> None:
        """An ordinary pull: everything is downloaded and unpacked."""
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, image, namespace=namespace, timeout=timeout)

    def rpull(self, image: str, namespace: str | None = None, timeout: float = 120) -> None:
        """A lazy pull through holdfast."""
        words = ("images", "rpull", "--plain-http", "--snapshotter", "holdfast", image)
        self.ctr(*words, namespace=namespace, remote=True, timeout=timeout)

    def remove_image(self, image: str, namespace: str | None = None) -> None:
        """Removes the image and waits for the garbage collection that follows."""
        self.ctr("images", "rm", "--sync", image, namespace=namespace, timeout=120)

    def new_name(self, prefix: str = "c") -> str:
        return f"{prefix}{next(self._names)}"

    def run_command(
        self,
        image: str,
        name: str,
        argv: Sequence[str],
        snapshotter: str = "holdfast",
        namespace: str | None = None,
        options: Sequence[str] = ("--rm",),
    ) -> list[str]:
        """The vector of a `ctr run` whose every file lies in the instance's folder."""
        own = ["--runc-root", str(self.root / "runc"), "--fifo-dir", str(self.root / "fifo")]
        words = ["run", *own, "--snapshotter", snapshotter, *options, image, name, *argv]
        return self.command(*words, namespace=namespace)

    def run(
        self,
        image: str,
        argv: Sequence[str],
        snapshotter: str = "holdfast",
        namespace: str | None = None,
        options: Sequence[str] = ("--rm",),
        timeout: float = 120,
        check: bool = True,
        name: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A container from its start to its end; its output is returned."""
        return run(
            self.run_command(image, name or self.new_name(), argv, snapshotter, namespace, options),
            timeout=timeout,
            check=check,
            env={MARKER: str(self._box.root)},
        )

    def start_container(
        self,
        image: str,
        argv: Sequence[str],
        snapshotter: str = "holdfast",
        namespace: str | None = None,
        options: Sequence[str] = ("--rm",),
    ) -> subprocess.Popen[str]:
        """A container whose output the caller reads while it runs. Ends with the instance at the latest."""
        return subprocess.Popen(
            self.run_command(image, self.new_name(), argv, snapshotter, namespace, options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, MARKER: str(self._box.root)},
            start_new_session=True,
        )

    def exec(self, name: str, argv: Sequence[str], namespace: str | None = None, timeout: float = 60) -> str:
        """Output of a command run inside a running container."""
        words = ["tasks", "exec", "--fifo-dir", str(self.root / "fifo"), "--exec-id", self.new_name("e"), name, *argv]
        return self.ctr(*words, namespace=namespace, timeout=timeout).stdout

    def delete_container(self, name: str, namespace: str | None = None) -> None:
        """Kills the task, waits for its end and deletes task and container."""
        self.ctr("tasks", "rm", "--force", name, namespace=namespace, check=False)
        self.ctr("containers", "rm", name, namespace=namespace)

    def snapshots(self, snapshotter: str = "holdfast", namespace: str | None = None) -> dict[str, tuple[str, str]]:
        """key -> (parent, kind), as containerd lists them."""
        lines = self.ctr("snapshots", "--snapshotter", snapshotter, "list", namespace=namespace).stdout.splitlines()[1:]
        rows = {}
        for words in (line.split() for line in lines):
            rows[words[0]] = (words[1] if len(words) > 2 else "", words[-1])
        return rows

    def wait_snapshotter(self, snapshotter: str = "holdfast", seconds: float = 20) -> None:
        """After a restart of the snapshotter: waits until containerd, which redials with back-off, reaches it again."""
        words = ("snapshots", "--snapshotter", snapshotter, "prepare", "probe")

        def reached() -> bool:
            if self.ctr(*words, check=False).returncode != 0:
                return False
            self.ctr(*words[:3], "rm", "probe")
            return True

        wait_for(f"containerd's connection to {snapshotter}", reached, seconds)

    @contextlib.contextmanager
    def mounted_view(
        self, chain_id: str, snapshotter: str, namespace: str | None = None, writable: bool = False
    ) -> Iterator[Path]:
        """A mount of the snapshot `chain_id`, read-only unless `writable`, gone at the end of the block.

        Of an active snapshot: `ctr snapshots view` makes one that the next garbage collection removes.
        """
        key = self.new_name("view")
        words = ("snapshots", "--snapshotter", snapshotter)
        target = self._box.root / "views" / f"{snapshotter}-{key}"
        target.mkdir(parents=True)
        self.ctr(*words, "prepare", key, chain_id, namespace=namespace)
        try:
            line = self.ctr(*words, "mounts", target, key, namespace=namespace).stdout
            if not line.startswith("mount "):
                raise HarnessError(f"no mount command for {key}: {line}")
            run(["mount", *([] if writable else ["--read-only"]), *shlex.split(line)[1:]])
            yield target
        finally:
            mounts.unmount(str(target))
            self.ctr(*words, "rm", key, namespace=namespace)
