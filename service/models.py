"""The registry of encoders: names and their versions, loaded, swapped, tried out on a share and unloaded at run time.

A version is loaded and warmed beside the one that answers, one at a time, in a thread. Then the name points to it,
between two requests. The old one keeps those that have it in hand and is stopped when there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ironclip.defences import Defence, make_defence
from ironclip.errors import EncoderNotFound, IronclipError
from service import telemetry
from service.catalogue import Catalogue
from service.decisions import domain_digest
from service.errors import EncoderBusy, EncoderInUse, RequestInvalid, VersionLost
from service.heap import trim_heap
from service.model_loading import Loaded, Loader, as_problem
from service.problems import problem
from service.runtime import ServedEncoder, free_cached_memory
from service.settings import Settings
from service.supervisor import Supervisor
from service.versions import Named, Source, Still, Version, always

# Loads that run and wait at most; names kept that have nothing but a failure to tell of.
_MOST_COMING = 16
_MOST_FAILED = 16
_LOOK = 0.02


class Models(Catalogue):
    """Encoders by name, and all that changes them.

    Args:
        settings: of the service.
        loader: makes served encoders.
        supervisor: watches their workers.
        defences: by name, of requests that name none.
        forget: lets go of whatever holds an encoder that has been unloaded.
    """

    def __init__(
        self,
        settings: Settings,
        loader: Loader,
        supervisor: Supervisor,
        defences: dict[str, Defence],
        forget: Callable[[ServedEncoder], None],
    ) -> None:
        super().__init__(settings)
        self._loader = loader
        self._supervisor = supervisor
        self._defences = defences
        self._forget = forget
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._log = telemetry.get_logger()

    async def first(
        self, name: str, path: str, source: Source, spec: str = "", still: Still = always, *, share: float = 0.0
    ) -> IronclipError | None:
        """Load an encoder at start, or a canary of one; returns what was wrong with it."""
        version = Version(name, spec or path, path, source, self._defence(name, None), share, still=still)
        self._named.setdefault(name, Named()).coming = version
        return await self._bring(version)

    def put(
        self,
        name: str,
        spec: str,
        path: str,
        *,
        source: Source = "api",
        expected: str = "",
        defence: Defence | None = None,
        share: float = 0.0,
        still: Still = always,
    ) -> bool:
        """Begin to load a version; whether there is anything to do.

        Args:
            name: of the encoder; it may be new.
            spec: as it was asked for.
            path: what is loaded for it.
            source: who asks.
            expected: its digest; where it is served already, nothing is loaded.
            defence: of requests that name none; that of the version before if not given.
            share: of the name's requests, for a canary; 0: it takes them all.
            still: whether the files are those that were seen, asked when they have been read.

        Raises:
            EncoderBusy: the name is being loaded, or too many are.
            RequestInvalid: a canary of a name of which nothing is served.
        """
        named = self._named.get(name, Named())
        if named.coming is not None:
            raise EncoderBusy(f"{name!r} is being loaded; GET /models/{name} says when that has ended.")
        if share and named.stable is None:
            raise RequestInvalid(
                "A canary is tried beside a version that is served, and there is none: leave canary out.",
                errors=[{"pointer": "/canary", "code": "canary", "detail": "There is no stable version."}],
            )
        wanted = self._defence(name, defence)
        version = Version(name, spec, path, source, wanted, share, expected, still)
        if expected and self._there(named, version):
            named.failed = None
            return False
        if sum(one.coming is not None for one in self._named.values()) >= _MOST_COMING:
            raise EncoderBusy(f"{_MOST_COMING} encoders are being loaded; ask again when one of them has ended.")
        named.coming = version
        self._named[name] = named
        self._spawn(self._bring(version))
        return True

    def _there(self, named: Named, asked: Version) -> bool:
        """Whether such a version is served; a canary is given the share, or promoted where it is to have all."""
        stable, canary = named.stable, named.canary
        wanted = (asked.expected, _form(asked.defence))
        if stable is not None and (stable.digest, _form(stable.defence)) == wanted:
            return True
        if canary is None or (canary.digest, _form(canary.defence)) != wanted:
            return False
        self._again(canary, asked)
        return True

    def _again(self, canary: Version, asked: Version) -> None:
        """Give a canary that is asked for once more its new share, or all requests."""
        canary.spec, canary.path = asked.spec, asked.path
        if asked.share:
            self._share(canary, asked.share)
        else:
            self.promote(canary.name)

    def promote(self, name: str) -> None:
        """Give the canary all requests; raises EncoderNotFound where there is none."""
        named, canary = self._with_canary(name)
        named.canary = None
        self._end_share(canary, "promoted")
        self._set_stable(named, canary)
        self._log.info("canary promoted", encoder=canary.name, digest=canary.digest)

    def end_canary(self, name: str) -> None:
        """Give the stable version all requests, and unload the canary; raises EncoderNotFound where there is none."""
        named, canary = self._with_canary(name)
        named.canary = None
        self._end_share(canary, "removed")
        self._retire(named, canary)
        self._log.info("canary removed", encoder=canary.name, digest=canary.digest)

    def withdraw(self, name: str, source: Source) -> None:
        """End the canary that a source brought, also one that is being loaded; of any other nothing is changed."""
        named = self._named.get(name, Named())
        if named.coming is not None and named.coming.share and named.coming.source == source:
            named.coming.dropped = True
        if self.tried(name, source):
            self.end_canary(name)

    def unload(self, name: str) -> None:
        """Serve an encoder no longer; what has it in hand ends well. One that is being loaded is not served at all.

        Raises:
            EncoderNotFound: there is none of this name.
            EncoderInUse: it is the default one, or the last.
        """
        name = self.resolved(name)
        named = self._named.get(name)
        if named is None:
            raise self._unknown()
        if name == self._settings.default_name:
            raise EncoderInUse(
                f"{name!r} is the default encoder (IRONCLIP_DEFAULT_ENCODER); load another in its place."
            )
        if named.stable is not None and len(self.names) == 1:
            raise EncoderInUse(f"{name!r} is the last encoder; load another first.")
        if named.coming is not None:
            named.coming.dropped = True
        if named.canary is not None:
            self.end_canary(name)
        if named.stable is not None:
            stable, named.stable = named.stable, None
            telemetry.hide_stable(_loaded(stable))
            self._retire(named, stable)
            self._log.info("encoder unloaded", encoder=name, digest=stable.digest)
        named.failed = None
        self._tidy(name)

    def end_probes(self) -> None:
        """Have every probe end with what it knows."""
        for served in self._everything():
            if served.prober is not None:
                served.prober.stop()

    async def stop(self) -> None:
        """Take no more, finish what is queued, and end every worker."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        for task in list(self._tasks):
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for served in list(self._everything()):
            await served.stop()

    async def _bring(self, version: Version) -> IronclipError | None:
        """Load, verify and warm a version, then serve it; returns what was wrong with it."""
        async with self._turn:
            fault: IronclipError | None = None
            try:
                outcome = await self._load(version)
            except Exception as error:
                fault, outcome = as_problem(error, version), "failed"
                fault.__traceback__ = fault.__cause__ = fault.__context__ = None  # they hold the half of an encoder
                await asyncio.to_thread(free_cached_memory)  # it may wait for the device
            named = self._named[version.name]
            named.coming = None
            if version.dropped:
                fault, outcome = None, "abandoned"
            elif version.served is not None:
                outcome = self._arrive(named, version)
            elif fault is not None:
                self._failed(named, version, fault)
            elif outcome == "unchanged":
                named.failed = None  # what is wanted now is served; what else was tried is nobody's wish any more
            if outcome == "abandoned" and version.served is not None:
                self._retire(named, version)
            telemetry.MODEL_LOADS.labels(outcome).inc()
            self._tidy(version.name)
            return fault

    async def _load(self, version: Version) -> str:
        """Set the version's encoder, unless there is no need of it any more; returns what became of the load."""
        if version.dropped:
            return "abandoned"
        self._log.info("loading encoder", encoder=version.name, spec=version.spec)
        loaded = await asyncio.to_thread(self._loader.load, version)
        same = next((one for one in self._named[version.name].serving if _alike(one, version, loaded)), None)
        if same is not None and not version.dropped:
            self._log.info("encoder is served already", encoder=version.name, digest=version.digest)
            if same.share:
                self._again(same, version)
            return "unchanged"
        if not version.dropped:
            version.served = await asyncio.to_thread(self._loader.warm, version, loaded)
        return "abandoned" if version.dropped else "served"

    def _arrive(self, named: Named, version: Version) -> str:
        """Let a warm version take traffic; returns what became of the load."""
        served = _loaded(version)
        if version.share and named.stable is None:
            return "abandoned"  # what it was to be tried beside has been unloaded meanwhile
        version.to("ready")
        named.failed = None
        for watched in served.watched(lambda: named.stable is version, lambda why: self._ailed(version, why)):
            self._supervisor.watch(watched)
        if not named.loaded:
            telemetry.watch_encoder(version.name, lambda: named.loaded)
        if not version.share:
            self._set_stable(named, version)
            self._log.info("encoder served", encoder=version.name, digest=version.digest, dtype=served.dtype)
            return "served"
        before, named.canary = named.canary, version
        if before is not None:
            self._end_share(before, "replaced")
            self._retire(named, before)
        self._share(version, version.share)
        return "canary"

    def _set_stable(self, named: Named, version: Version) -> None:
        """Point the name to a version, and let the one before go."""
        before, named.stable = named.stable, version
        version.share = 0.0
        if before is not None:
            telemetry.hide_stable(_loaded(before))
            self._retire(named, before)
        telemetry.show_stable(_loaded(version))

    def _share(self, canary: Version, share: float) -> None:
        canary.share = share
        telemetry.CANARY_SHARE.labels(canary.name, telemetry.short(canary.digest)).set(share)
        self._log.info("canary takes a share", encoder=canary.name, digest=canary.digest, share=share)

    def _end_share(self, canary: Version, outcome: str) -> None:
        telemetry.CANARIES_ENDED.labels(outcome).inc()
        telemetry.hide_canary(canary.name, canary.digest)

    def _with_canary(self, name: str) -> tuple[Named, Version]:
        named = self._named.get(self.resolved(name))
        if named is None:
            raise self._unknown()
        if named.canary is None:
            raise EncoderNotFound("The encoder has no canary; PUT it with a share (canary) first.")
        return named, named.canary

    def _failed(self, named: Named, version: Version, fault: IronclipError) -> None:
        """Remember why a version is not served; whatever is served stays."""
        version.to("failed")
        version.failure = problem(fault)
        named.failed = version
        self._log.error("encoder failed", encoder=version.name, code=fault.code, reason=fault.detail)
        alone = [name for name, one in self._named.items() if one.failed is not None and not one.serving]
        for name in alone[:-_MOST_FAILED]:
            self._named[name].failed = None
            self._tidy(name)

    def _ailed(self, version: Version, why: str) -> None:
        """A worker of a version had to be started again: a canary is out of service with that."""
        named = self._named.get(version.name)
        version.lost = version.lost or "in a row" in why
        if named is None or named.canary is not version:
            return
        named.canary = None
        self._end_share(version, "failed")
        version.to("failed")
        version.failure = problem(VersionLost(f"The canary was taken out of service: {why}."))
        named.failed = version
        self._log.error("canary failed", encoder=version.name, digest=version.digest, reason=why)
        self._retire(named, version)

    def _unfit(self, canary: Version) -> bool:
        if not self._supervisor.ails(canary.served):
            return False
        self._ailed(canary, "a worker is not running or not moving")
        return True

    def _retire(self, named: Named, version: Version) -> None:
        """Take no new requests for a version, and stop it when nobody has it in hand."""
        if version.state == "ready":
            version.to("draining")
        named.leaving.append(version)
        self._spawn(self._drain(named, version))

    async def _drain(self, named: Named, version: Version) -> None:
        served = _loaded(version)
        if served.prober is not None:
            served.prober.retire()
        # No request lives longer than that, whatever it waits for.
        end = time.monotonic() + self._settings.request_timeout_ms / 1000 + 1
        while (version.holders or served.busy) and not version.lost and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        self._supervisor.forget(served)
        await served.stop()
        named.leaving.remove(version)
        version.served = None
        if version.digest not in [one.digest for one in named.serving]:
            telemetry.forget_version(version.name, version.digest)
        self._tidy(version.name)
        served.retired = True
        self._forget(served)
        served.release()
        self._log.info("encoder stopped", encoder=version.name, digest=version.digest)
        await asyncio.to_thread(trim_heap)

    def _tidy(self, name: str) -> None:
        """Forget a name of which nothing is left, and the metrics of one of which nothing runs."""
        named = self._named.get(name)
        if named is None or named.loaded:
            return
        telemetry.forget_encoder(name)
        if named.coming is None and named.failed is None:
            del self._named[name]

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _defence(self, name: str, asked: Defence | None) -> Defence:
        """What was asked for, or what the version before has, or the settings say."""
        stable = self._named.get(name, Named()).stable
        if asked is not None:
            return asked
        return stable.defence if stable is not None else self._defences.get(name, make_defence())


def _form(defence: Defence) -> tuple[str, dict[str, Any]]:
    return defence.name, dict(defence.options())


def _loaded(version: Version) -> ServedEncoder:
    assert version.served is not None
    return version.served


def _alike(one: Version, other: Version, loaded: Loaded) -> bool:
    """Whether a version that is served answers just as one that has been loaded would."""
    served = one.served
    return (
        served is not None
        and (one.digest, _form(one.defence)) == (other.digest, _form(other.defence))
        and domain_digest(served.domain) == domain_digest(loaded.domain)
        and served.encoder.provenance == loaded.encoder.provenance
    )
