"""The watched folder: each artifact in it is an encoder, named after its subfolder, or the canary of one.

A folder that is being copied must not be taken: its files are complete when the weights have the length that their own
header gives, and it has come to rest when two looks in a row see the same. What was read all the same while it changed
is thrown away, and looked at again. Folders are followed through symbolic links (Kubernetes and rsync swap those), and
one version is read from one real folder to the end.

A canary that has been taken out of service is not put back for a new share, but for new files. One whose files come to
stand under the encoder's own name is promoted, and not loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from pathlib import Path

from ironclip.errors import IronclipError
from service import telemetry
from service.errors import EncoderBusy, EncoderInUse, VersionLost
from service.model_sights import Sight, scan, unchanged
from service.models import Models
from service.settings import Settings

_AGAIN_SECONDS = 60.0  # after which a load is tried again that memory did not suffice for


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
        self._taken: dict[str, Sight] = {}  # by slot, what was loaded, or could not be
        self._again: dict[str, float] = {}
        self._missed: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        self._task: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()

    async def start(self) -> None:
        """Load what is there, and begin to watch; one that cannot be loaded is told and left out."""
        # Each encoder before its canary, which the order of their slots sees to.
        for slot, sight in sorted((await asyncio.to_thread(self._scan) or {}).items()):
            self._last[slot] = sight
            # Not looked at twice: at start nothing is served yet that a half copy could take the place of, and the
            # checksum of its weights tells of one.
            if sight.fault or not self._wanted(sight):
                continue
            self._taken[slot] = sight
            role, still, spec = sight.role, partial(unchanged, sight), str(self._folder / sight.folder)
            await self._models.first(role.name, sight.path, "folder", spec, still, share=role.share)
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
        """Every subfolder that may be an encoder, by its slot; None where the folder itself cannot be read."""
        try:
            return scan(self._folder, self._tell, self._settings.encoders)
        except OSError as error:
            self._tell("", f"cannot be read ({error.strerror}); what is served stays")
            return None

    def _compare(self, seen: dict[str, Sight]) -> None:
        for slot, sight in sorted(seen.items()):
            if self._last.get(slot) != sight:
                continue  # not at rest
            if sight.fault:
                self._tell(sight.folder, f"is not taken: {sight.fault}", sight.fingerprint)
            elif sight.role.share:
                self._follow_canary(slot, sight)
            elif slot not in self._taken or self._taken[slot].fingerprint != sight.fingerprint or self._due(slot):
                self._take(slot, sight)
        gone = {slot for slot in self._taken if slot not in seen and not self._moved(slot, seen)}
        for slot in gone & self._missed:
            self._drop(slot)
        self._missed = gone
        self._last = seen

    def _follow_canary(self, slot: str, sight: Sight) -> None:
        known = self._taken.get(slot)
        if not self._wanted(sight):
            # It is the encoder's own by now: if another takes that place, this one is to be tried anew.
            self._taken.pop(slot, None)
        elif known is None or known.content != sight.content or self._due(slot):
            self._take(slot, sight)
        elif (known.role, known.fingerprint) != (sight.role, sight.fingerprint):
            self._follow_move(slot, sight)

    def _follow_move(self, slot: str, sight: Sight) -> None:
        """Give a canary whose files are the same, elsewhere or under another name, what its name says."""
        name = sight.role.name
        if self._models.loading(name):
            return  # at a later look it is known whether it serves
        failure = self._models.failure(name, canary=True)
        unread = failure is not None and failure["code"] != VersionLost.code  # perhaps since it was moved meanwhile
        if unread or self._models.tried(name, "folder"):
            self._take(slot, sight)
        else:  # it was taken out of service, and a share is no reason to put it back
            self._taken[slot] = sight

    def _wanted(self, sight: Sight) -> bool:
        """Whether there is something to load: for a canary, if it is another than what it is tried beside."""
        role = sight.role
        if not role.share:
            return True
        stable = self._taken.get(role.name)
        if stable is not None and stable.content == sight.content:
            return False
        if role.name in self._models.names:
            return True
        if not self._models.loading(role.name):
            self._tell(sight.folder, "is not tried: no encoder of this name is served")
        return False

    def _moved(self, slot: str, seen: dict[str, Sight]) -> bool:
        """Whether the files of a canary stand under the encoder's own name by now, and are about to be taken there."""
        known = self._taken[slot]
        stable = seen.get(known.role.name)
        return bool(known.role.share) and stable is not None and stable.content == known.content

    def _take(self, slot: str, sight: Sight) -> None:
        role = sight.role
        canary = self._taken.get(role.canary_slot)
        # The digest, where the canary has been loaded from these very files: then nothing is loaded again.
        same = canary is not None and canary.content == sight.content
        expected = self._models.tried(role.name, "folder") if same else ""
        try:
            spec, still = str(self._folder / sight.folder), partial(unchanged, sight)
            self._models.put(
                role.name, spec, sight.path, source="folder", expected=expected, share=role.share, still=still
            )
        except EncoderBusy:
            return  # at the next look
        self._taken[slot] = sight
        self._again[slot] = time.monotonic() + _AGAIN_SECONDS
        if same and not role.share:
            del self._taken[role.canary_slot]

    def _due(self, slot: str) -> bool:
        """Whether a load is worth trying again that failed for no fault of the folder's."""
        role = self._taken[slot].role
        failure = self._models.failure(role.name, canary=bool(role.share))
        return failure is not None and failure["status"] == 503 and time.monotonic() > self._again.get(slot, 0.0)

    def _drop(self, slot: str) -> None:
        """Unload what has lost its folder, unless somebody else has put another in its place."""
        role = self._taken.pop(slot).role
        if role.share:
            self._models.withdraw(role.name, "folder")
            return
        if self._models.source(role.name) not in ("folder", None):
            return
        try:
            self._models.unload(role.name)
            self._taken.pop(role.canary_slot, None)  # it went with it
        except EncoderInUse as error:
            self._log.warning("the folder of an encoder has gone; it stays", encoder=role.name, reason=error.detail)
        except IronclipError:
            return  # it has been unloaded already

    def _tell(self, folder: str, what: str, fingerprint: str = "") -> None:
        """Say once what is wrong with a folder."""
        if (folder, what + fingerprint) not in self._told:
            self._told.add((folder, what + fingerprint))
            self._log.warning("models folder", folder=str(self._folder / folder), reason=what)
