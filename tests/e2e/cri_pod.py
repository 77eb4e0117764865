"""One pod through containerd's CRI plugin, as the kubelet runs it: pull with credentials, run, exec, stats, remove."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_support import expect, run_steps
from holdfast_harness import Containerd, Holdfast, Instance, images, mounts
from holdfast_harness.holdfast import binary
from holdfast_harness.oci_layout import Layout
from holdfast_harness.process import run, wait_for

USER, PASSWORD = "puller", "right horse"


def _write_pause(tar: tarfile.TarFile) -> None:
    entry = tar.gettarinfo(str(binary("holdfast-pause")), arcname="pause")
    entry.mode = 0o755
    with binary("holdfast-pause").open("rb") as file:
        tar.addfile(entry, file)


def _push_pause_image(box: Instance, address: str) -> str:
    layout = Layout(box.root / "pause")
    layout.add_layer(_write_pause)
    layout.finish([], ["/pause"])
    target = f"docker://{address}/pause:latest"
    copy = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
    run([*copy, f"oci:{box.root / 'pause'}:latest", target], timeout=60)
    return f"{address}/pause:latest"


def _docker_config(box: Instance, address: str) -> Path:
    path = box.root / "docker-config.json"
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": secret}}}))
    path.chmod(0o600)
    return path


@dataclass
class Cluster:
    box: Instance
    holdfast: Holdfast
    containerd: Containerd
    image: str

    def cri(self, *words: str | Path, timeout: int = 120) -> Any:
        command = [binary("holdfast-cri"), "--socket", self.containerd.socket, "--timeout", str(timeout), *words]
        return json.loads(run(command, timeout=timeout + 10).stdout)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    image = images.ensure("demo")
    with Instance("cri") as box:
        private = box.registry(store=image.store, read_only=True, users={USER: PASSWORD})
        public = box.registry()
        pause = _push_pause_image(box, public.address)
        config = f'[fetch]\ndocker_config = "{_docker_config(box, private.address)}"\n'
        holdfast = box.holdfast(config=config)
        containerd = box.containerd(holdfast, sandbox_image=pause)
        yield Cluster(box, holdfast, containerd, image.reference(private.address, "esgz"))


def a_pod_runs_from_a_private_lazy_image_and_leaves_nothing() -> None:
    with cluster() as here:
        pulled = here.cri("pull", here.image, "--user", USER, "--password", PASSWORD)
        expect(pulled["image_ref"], "the pull names no image")
        layers = here.holdfast.ctl_json("layers")["layers"]
        expect(layers, "no layer is lazy: the pull fell back")
        pod = here.cri("run-pod", "one")["pod"]
        container = here.cri("run", pod, "one", here.image, "--", "sleep", "1000")["container"]
        said = here.cri("exec", container, "--", "python3", "-c", "import json, sqlite3; print(6 * 7)")
        expect(said["exit_code"] == 0 and said["stdout"] == "42\n", f"exec said {said}")
        here.cri("exec", container, "--", "sh", "-c", "head -c 100000 /dev/zero > /srv/written")
        wait_for("stats of the writable layer", lambda: here.cri("stats", container)["writable_bytes"] >= 100_000, 40, 1)
        filesystems = here.cri("image-fs")
        expect(any("holdfast" in one["mountpoint"] for one in filesystems), f"image file systems: {filesystems}")
        here.cri("remove", container)
        here.cri("remove-pod", pod)
        here.cri("remove-image", here.image)
        wait_for("unmounting", lambda: _lazy_layers(here) == 0, 60, 0.5)


def _lazy_layers(here: Cluster) -> int:
    return len(mounts.fuse_mounts_below(here.holdfast.state))


def a_pull_with_wrong_credentials_fails_and_says_so() -> None:
    with cluster() as here:
        command = [binary("holdfast-cri"), "--socket", here.containerd.socket, "pull", here.image, "--user", USER]
        refused = run([*command, "--password", "wrong"], check=False)
        expect(refused.returncode == 1, "the pull went through")
        expect("401" in refused.stderr or "authorization" in refused.stderr.lower(), f"it said: {refused.stderr}")


if __name__ == "__main__":
    sys.exit(run_steps(a_pod_runs_from_a_private_lazy_image_and_leaves_nothing, a_pull_with_wrong_credentials_fails_and_says_so))
