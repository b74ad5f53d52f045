"""The service without HTTP: encoders, caches, label sets, and whether all of it is fit to answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Literal

from ironclip.defences import Defence
from ironclip.domain import Domain, load_domain
from ironclip.errors import EncoderNotFound, IronclipError, NotReady, OptionError
from ironclip.labels import LabelLimits
from ironclip.loading import DEMO_FOLDER
from service import telemetry
from service.answers import Answers
from service.cache import ArrayCache
from service.decisions import Classifiers, Plan
from service.errors import RequestInvalid
from service.images import ImageDecoder, ImageLimits
from service.label_sets import LabelSets, Registered, load_built_in
from service.label_stores import FileStore, RedisStore, Store
from service.plans import Plans, check_head, parse_defence
from service.probe_ledger import Ledger
from service.redis_link import RedisLink
from service.runtime import ServedEncoder, load_served_encoder, use_threads
from service.schemas import Options
from service.settings import DEFAULT_ALIAS, Settings, SettingsInvalid

State = Literal["loading", "ready", "draining", "failed"]
# A model worker that has work and has not moved for so long will not move again.
_STALLED_SECONDS = 120.0
# A text bank is large and slow to make: a look-up in Redis may take longer than for a score vector.
_BANK_SECONDS = 1.0


class Service:
    """Everything behind the routes.

    Args:
        settings: as read at start.
        on_fatal: called when an encoder cannot be loaded, with the reason; the process should then end.
    """

    def __init__(self, settings: Settings, on_fatal: Callable[[IronclipError], None] | None = None) -> None:
        self.settings = settings
        self.state: State = "loading"
        self.served: dict[str, ServedEncoder] = {}
        self.domains: dict[str, Domain | None] = {}
        self.image_limits = ImageLimits(settings.max_image_bytes, settings.max_pixels, settings.max_side)
        self.label_limits = self._limits(settings.max_labels)
        self._on_fatal = on_fatal
        self._failure = ""
        self._loading: asyncio.Task[None] | None = None
        self._plans = Plans(self.label_limits, settings.max_views)
        self._defences = self._read_defences()
        self._warming: set[asyncio.Task[None]] = set()
        self._log = telemetry.get_logger()
        url = settings.redis_url
        self._link = RedisLink(url.get_secret_value(), settings.redis_timeout_ms / 1000) if url is not None else None
        store: Store = (
            RedisStore(self._link, settings.redis_prefix, settings.max_label_sets)
            if self._link is not None
            else FileStore(settings.state_dir, settings.max_label_sets)
        )
        self.label_sets = LabelSets(
            store,
            load_built_in(DEMO_FOLDER / "label_sets", DEMO_FOLDER / "trees"),
            self._limits(settings.max_registered_labels),
        )
        self.decoder = ImageDecoder(
            self.image_limits,
            workers=settings.decode_workers,
            max_pending=max(settings.max_queue, settings.max_images),
        )
        vectors = settings.cache_bytes
        self._caches = [
            self._cache("images", vectors // 8),
            self._cache("features", vectors // 4),
            self._cache("scores", vectors - vectors // 8 - vectors // 4),
            self._cache("text-banks", settings.text_cache_bytes // 2, _BANK_SECONDS),
        ]
        images, features, scores, banks = self._caches
        classifiers = Classifiers(banks, settings.text_cache_bytes // 2)
        self.probes = Ledger(
            self._link,
            settings.redis_prefix,
            settings.redis_mac_key.get_secret_value().encode(),
            settings.probe_ttl_seconds,
        )
        self.answers = Answers(self.decoder, images, features, scores, classifiers)

    async def start(self) -> None:
        """Begin to load the encoders; returns at once, `not_ready` tells when they are there."""
        telemetry.READY.set(0)
        if self._link is not None:
            await self._link.start()
        self._loading = asyncio.create_task(self._load())

    def drain(self) -> None:
        """Say no on /readyz from now on; requests are still answered."""
        if self.state != "failed":
            self.state = "draining"
        telemetry.READY.set(0)

    def end_probes(self) -> None:
        """Have every probe end with what it knows, so that whoever waits for it is answered before the end."""
        for served in self.served.values():
            if served.prober is not None:
                served.prober.stop()

    async def stop(self) -> None:
        """Finish what is queued and let everything go."""
        self.drain()
        if self._loading is not None:
            self._loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loading
        for task in self._warming:
            task.cancel()
        for served in self.served.values():
            await served.stop()
        await self.probes.close()
        self.decoder.close()
        for cache in self._caches:
            await cache.flush()
        if self._link is not None:
            await self._link.close()

    def not_ready(self) -> str | None:
        """Why the service cannot answer, or None."""
        reason = {"loading": "loading", "draining": "draining", "failed": self._failure}.get(self.state)
        if reason is None:
            dead = [
                name for name, one in self.served.items() if not one.alive or one.stalled_seconds > _STALLED_SECONDS
            ]
            reason = f"a worker of {', '.join(dead)} is not running or not moving" if dead else None
        telemetry.READY.set(reason is None)
        return reason

    def encoder(self, name: str) -> ServedEncoder:
        """The encoder of this name, or of the alias `default`.

        Raises:
            NotReady: the encoders are not loaded yet.
            EncoderNotFound: there is none of this name.
        """
        wanted = self.settings.default_name if name == DEFAULT_ALIAS else name
        found = self.served.get(wanted)
        if found is not None:
            return found
        if wanted in self.settings.encoders:
            raise NotReady(f"The service is not ready: {self.not_ready() or 'loading'}.", retry_after=1)
        raise EncoderNotFound(
            f"No encoder of this name is served; there are: {', '.join(self.settings.encoders)}, and the alias "
            f"{DEFAULT_ALIAS!r}."
        )

    async def plan(self, options: Options, size: int = 0) -> Plan:
        """What a classification with these options means; kept for the next request that asks the same.

        `size` is what the options took in bytes as they came: large ones are not taken apart on the event loop.

        Raises:
            IronclipError: an option, the labels or the tree cannot be used, or a name is not known.
        """
        if (options.labels is None) == (options.label_set is None):
            raise RequestInvalid("Give exactly one of labels and label_set.")
        served = self.encoder(options.encoder)
        entry = await self.label_sets.get(options.label_set) if options.label_set is not None else None
        return await self._plans.get(served, self.domains.get(served.name), options, entry, size)

    def warm(self, entry: Registered) -> None:
        """Begin to encode a newly registered set for the default encoder, before the first picture asks for it."""

        async def encode() -> None:
            # Whatever is wrong with the set for this encoder, the request that uses it is told.
            with contextlib.suppress(IronclipError):
                plan = await self.plan(Options(label_set=f"{entry.name}@{entry.digest}"))
                await self.answers.classifiers.get(plan)

        if self.state == "ready":
            task = asyncio.create_task(encode())
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    def _read_defences(self) -> dict[str, Defence]:
        """Each encoder's own defence; raises SettingsInvalid."""
        found = {}
        for name, value in self.settings.defences.items():
            try:
                found[name] = self._plans.checked(parse_defence(value))
            except (OptionError, TypeError, AttributeError) as error:
                raise SettingsInvalid(f"IRONCLIP_DEFENCES, {name}: {error}") from None
        return found

    def defence(self, served: ServedEncoder, value: Any) -> Defence:
        """As `Plans.defence`."""
        return self._plans.defence(served, value)

    def _load_one(self, name: str, spec: str) -> ServedEncoder:
        settings = self.settings
        served = load_served_encoder(
            name,
            spec,
            device=settings.device,
            dtype=settings.dtype,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            idle_wait_ms=settings.idle_wait_ms,
            defence=self._defences.get(name),
            most_probes=settings.max_probes if settings.probes else 0,
            quantum_ms=settings.probe_quantum_ms,
            images_expected=lambda: self.decoder.flowing,
            observe=telemetry.observe_batch,
        )
        check_head(served.defence, served)
        return served

    async def _load(self) -> None:
        use_threads(self.settings.threads)
        for name, spec in self.settings.encoders.items():
            self._log.info("loading encoder", encoder=name, spec=spec)
            try:
                served = await asyncio.to_thread(self._load_one, name, spec)
                self.domains[name] = load_domain(served.encoder.folder) if served.encoder.folder else None
            except IronclipError as error:
                self._fail(name, error)
                return
            except Exception as error:
                self._log.exception("encoder failed", encoder=name)
                self._fail(name, IronclipError(f"{type(error).__name__} while loading; the log has it."))
                return
            self.served[name] = served
            telemetry.watch_encoder(served)
            telemetry.watch_prober(served)
        if self.state == "loading":
            self.state = "ready"
            telemetry.READY.set(1)
            self._log.info("ready", encoders=list(self.served), default=self.settings.default_name)

    def _fail(self, name: str, error: IronclipError) -> None:
        self.state, self._failure = "failed", f"the encoder {name!r} cannot be loaded ({error.code})"
        self._log.error("encoder failed", encoder=name, code=error.code)
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _limits(self, labels: int) -> LabelLimits:
        return LabelLimits(labels=labels, text_chars=self.settings.max_text_chars, texts=self.settings.max_prompts)

    def _cache(self, name: str, max_bytes: int, shared_timeout: float | None = None) -> ArrayCache:
        return ArrayCache(
            name,
            max_bytes=max_bytes,
            ttl=self.settings.cache_ttl_seconds,
            link=self._link,
            prefix=self.settings.redis_prefix,
            secret=self.settings.redis_mac_key.get_secret_value().encode(),
            shared_timeout=shared_timeout,
        )
