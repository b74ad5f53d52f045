"""The watched folder: each artifact in it is an encoder, named after its subfolder.

A folder that is being copied must not be taken: its files are complete when the weights have the length that their own
header gives, and it has come to rest when two looks in a row see the same. What was read all the same while it changed
is thrown away, and looked at again. Folders are followed through symbolic links (Kubernetes and rsync swap those), and
one version is read from one real folder to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import struct
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ironclip.artifact import CONFIG_FILE, META_FILE, WEIGHTS_FILE, read_meta
from ironclip.errors import ArtifactError, IronclipError
from service import telemetry
from service.errors import EncoderBusy, EncoderInUse
from service.models import Models
from service.settings import DEFAULT_ALIAS, NAME_PATTERN, Settings

_MOST_HEADER = 100_000_000  # bytes of a safetensors header at most, as its own readers have it
_AGAIN_SECONDS = 60.0  # after which a load is tried again that memory did not suffice for


@dataclass(frozen=True)
class Sight:
    """One subfolder as it was seen: the real folder, a fingerprint of its files, and what is missing, if anything."""

    path: str
    fingerprint: str
    fault: str = ""


def see(folder: Path) -> Sight:
    """Look at one artifact; blocks. Raises OSError for what cannot be read, also where it goes away meanwhile."""
    real = Path(os.path.realpath(folder))
    marks: list[object] = [str(real)]
    for path in sorted(real.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        stat = path.stat()
        marks.append((path.name, os.path.realpath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    meta = real / META_FILE
    if meta.is_file():
        marks.append(hashlib.sha256(meta.read_bytes()).hexdigest())
    return Sight(str(real), hashlib.sha256(repr(marks).encode()).hexdigest(), _missing(real))


def _missing(folder: Path) -> str:
    """What an artifact lacks; "" for one that is complete."""
    for name in (META_FILE, CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            return f"it has no {name}"
    try:
        read_meta(folder)
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ArtifactError, ValueError, RecursionError):
        return f"{META_FILE} or {CONFIG_FILE} cannot be read"
    with (folder / WEIGHTS_FILE).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(size, _MOST_HEADER):
            return f"{WEIGHTS_FILE} is not complete"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            return f"{WEIGHTS_FILE} cannot be read"
    return "" if whole == size else f"{WEIGHTS_FILE} has {size} bytes of {whole}"


def unchanged(sight: Sight) -> bool:
    """Whether a folder is what it was when it was seen; blocks."""
    try:
        return see(Path(sight.path)).fingerprint == sight.fingerprint
    except OSError:
        return False


class ModelFolder:
    """Keeps the encoders of a folder in step with it.

    Args:
        folder: whose subfolders are artifacts.
        models: what they are loaded into.
        settings: of the service.
    """

    def __init__(self, folder: Path, models: Models, settings: Settings) -> None:
        self._folder = folder
        self._models = models
        self._settings = settings
        self._last: dict[str, Sight] = {}
        self._taken: dict[str, str] = {}  # name -> fingerprint of what was loaded, or could not be
        self._again: dict[str, float] = {}
        self._missed: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        self._task: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()

    async def start(self) -> None:
        """Load what is there, and begin to watch; one that cannot be loaded is told and left out."""
        for name, sight in (await asyncio.to_thread(self._scan) or {}).items():
            self._last[name] = sight
            # Not looked at twice: at start nothing is served yet that a half copy could take the place of, and the
            # checksum of its weights tells of one.
            if not sight.fault:
                self._taken[name] = sight.fingerprint
                still = partial(unchanged, sight)
                await self._models.first(name, sight.path, "folder", str(self._folder / name), still)
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.models_poll_seconds)
            try:
                seen = await asyncio.to_thread(self._scan)
                if seen is not None:
                    self._compare(seen)
            except Exception:
                self._log.exception("the models folder could not be followed; it is looked at again")

    def _scan(self) -> dict[str, Sight] | None:
        """Every subfolder that may be an encoder; None where the folder itself cannot be read."""
        seen = {}
        try:
            names = sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        except OSError as error:
            self._tell("", f"cannot be read ({error.strerror}); what is served stays")
            return None
        for name in names:
            if name.startswith((".", "lost+found")):
                continue
            if not re.fullmatch(NAME_PATTERN, name) or name == DEFAULT_ALIAS:
                self._tell(name, f"cannot be an encoder's name: {NAME_PATTERN}, and not 'default'")
            elif name in self._settings.encoders:
                self._tell(name, "is an encoder of IRONCLIP_ENCODERS, which stays")
            else:
                try:
                    seen[name] = see(self._folder / name)
                except OSError as error:  # it changes under our hands
                    seen[name] = Sight("", "", error.strerror or "cannot be read")
        return seen

    def _compare(self, seen: dict[str, Sight]) -> None:
        for name, sight in seen.items():
            if self._last.get(name) != sight:
                continue  # not at rest
            if sight.fault:
                self._tell(name, f"is not taken: {sight.fault}", sight.fingerprint)
            elif self._taken.get(name) != sight.fingerprint or self._due(name):
                self._take(name, sight)
        for name in [name for name in self._taken if name not in seen]:
            if name in self._missed:
                self._drop(name)
        self._missed = {name for name in self._taken if name not in seen}
        self._last = seen

    def _take(self, name: str, sight: Sight) -> None:
        try:
            still = partial(unchanged, sight)
            self._models.put(name, str(self._folder / name), sight.path, source="folder", still=still)
        except EncoderBusy:
            return  # at the next look
        self._taken[name] = sight.fingerprint
        self._again[name] = time.monotonic() + _AGAIN_SECONDS

    def _due(self, name: str) -> bool:
        """Whether a load is worth trying again that failed for no fault of the folder's."""
        failure = self._models.failure(name)
        return failure is not None and failure["status"] == 503 and time.monotonic() > self._again.get(name, 0.0)

    def _drop(self, name: str) -> None:
        """Unload an encoder whose folder has gone, unless somebody else has put another in its place."""
        del self._taken[name]
        if self._models.source(name) not in ("folder", None):
            return
        try:
            self._models.unload(name)
        except EncoderInUse as error:
            self._log.warning("the folder of an encoder has gone; it stays", encoder=name, reason=error.detail)
        except IronclipError:
            return  # it has been unloaded already

    def _tell(self, name: str, what: str, fingerprint: str = "") -> None:
        """Say once what is wrong with a folder."""
        if (name, what + fingerprint) not in self._told:
            self._told.add((name, what + fingerprint))
            self._log.warning("models folder", folder=str(self._folder / name), reason=what)
