"""A container engine for docker/image_test.py: Docker where its daemon answers, Podman with runc elsewhere.

Podman's images and containers lie in a store of the test's own, so that nothing of the user's is touched and all of it
can be removed.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

PIP_CONFIG_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "no-index")


class EngineError(Exception):
    """A command of the engine failed, or there is none; the text says what to do."""


class Engine:
    """Runs the engine's commands; `host_network` says whether containers share the network of this machine."""

    def __init__(self, name: str, options: list[str], store: Path | None) -> None:
        self.name = name
        self.host_network = name == "podman"
        self._command = [name, *options]
        self._store = store

    def run(self, *arguments: str, timeout: float = 120, check: bool = True, live: bool = False) -> str:
        """One command; returns what it printed, both streams.

        Raises:
            EngineError: it failed, and `check` is set.
        """
        command = [*self._command, *arguments]
        output = None if live else subprocess.PIPE
        done = subprocess.run(
            command, stdout=output, stderr=None if live else subprocess.STDOUT, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise EngineError(f"{self.name} {' '.join(arguments)[:300]}: status {done.returncode}\n{done.stdout or ''}")
        return (done.stdout or "").strip()

    def run_options(self) -> list[str]:
        """Options that every container gets here."""
        if self.name != "podman":
            return []
        # A limit above the caller's own, which Podman's defaults are, is refused where the caller may not raise it.
        limits = []
        for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
            hard = resource.getrlimit(kind)[1]
            limit = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
            limits.append(f"--ulimit={name}={limit}:{limit}")
        # Its health checks need systemd, so the test runs the check itself. A read-only root gets no folders but ours.
        return ["--network=host", "--no-healthcheck", "--read-only-tmpfs=false", *limits]

    def build(self, dockerfile: str, tag: str, arguments: dict[str, str], folder: Path, timeout: float) -> None:
        """Build an image from `folder`, with the pip configuration and the CA bundle of this machine as secrets."""
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        scratch = Path(mkdtemp())
        try:
            text, folders = pip_configuration()
            (scratch / "pip.conf").write_text(text, encoding="utf-8")
            options.append(f"--secret=id=pip.conf,src={scratch / 'pip.conf'}")
            bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
            if bundle:
                options.append(f"--secret=id=ca.crt,src={bundle}")
            if self.name == "podman":
                options += ["--isolation=chroot", "--format=docker", *(f"--volume={f}:{f}:ro" for f in folders)]
            self.run("build", *options, f"--file={dockerfile}", f"--tag={tag}", str(folder), timeout=timeout, live=True)
        finally:
            shutil.rmtree(scratch)

    def base_image(self, wanted: str) -> str:
        """The base image that was asked for if it is here or can be pulled, else Debian's by debootstrap.

        Raises:
            EngineError: neither can be had.
        """
        for arguments in (("image", "inspect", wanted), ("pull", "--quiet", wanted)):
            try:
                self.run(*arguments, timeout=600)
                return wanted
            except EngineError:
                continue
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            raise EngineError(
                f"{wanted} cannot be pulled; as root, with debootstrap installed, Debian stands in for it"
            )
        print(f"{wanted} cannot be pulled: a base from debootstrap instead", flush=True)
        folder = Path(mkdtemp())
        try:
            packages = "python3,python3-venv,ca-certificates"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder / "root")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
            shutil.rmtree(folder / "root/var/lib/apt/lists")
            for package in (folder / "root/var/cache/apt/archives").glob("*.deb"):
                package.unlink()
            subprocess.run(["tar", "-C", folder / "root", "-cf", folder / "root.tar", "."], check=True, timeout=300)
            self.run("import", str(folder / "root.tar"), "localhost/ironclip-base:bookworm", timeout=300)
        finally:
            shutil.rmtree(folder)
        return "localhost/ironclip-base:bookworm"

    def close(self) -> None:
        """Remove the test's store, with all images and containers in it; Docker's images stay."""
        if self._store is not None:
            # Not `system reset`, which takes networks along that are not of this store.
            self.run("rm", "--all", "--force", timeout=300, check=False)
            self.run("rmi", "--all", "--force", timeout=300, check=False)
            shutil.rmtree(self._store, ignore_errors=True)


def find_engine(store: Path) -> Engine:
    """Docker if its daemon answers, else Podman with a store of its own in `store`.

    Raises:
        EngineError: there is neither.
    """
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, timeout=30).returncode == 0:
        return Engine("docker", [], None)
    if shutil.which("podman") is None or shutil.which("runc") is None:
        raise EngineError("no Docker daemon answers; install podman and runc (apt-get install podman runc debootstrap)")
    store.mkdir(parents=True, exist_ok=True)
    options = [
        f"--root={store / 'storage'}",
        f"--runroot={store / 'run'}",
        "--cgroup-manager=cgroupfs",
        "--log-level=fatal",
    ]
    driver = os.environ.get("STORAGE_DRIVER") or "overlay"
    return Engine("podman", [*options, f"--storage-driver={driver}", "--runtime=runc"], store)


def pip_configuration() -> tuple[str, list[str]]:
    """This machine's pip configuration as a file, and the folders on this disk that it names."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", done.stdout, re.MULTILINE))
    found = {name: value.replace("\\n", " ") for name, value in found.items() if name in PIP_CONFIG_KEYS}
    text = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items())
    places = [place.removeprefix("file://") for value in found.values() for place in value.split()]
    folders = {Path(place) for place in places if place.startswith("/") and Path(place).is_dir()}
    # An index of a folder links to files beside it.
    return text, sorted({str(folder.parent if folder.name == "simple" else folder) for folder in folders})
