"""The service without HTTP: encoders, caches, label sets, and whether all of it is fit to answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any, Literal

from ironclip.defences import Defence
from ironclip.errors import IronclipError, OptionError, UnknownEncoder
from ironclip.labels import LabelLimits
from ironclip.loading import DEMO_FOLDER
from service import telemetry
from service.answers import Answers
from service.cache import ArrayCache
from service.decisions import Classifiers, Plan
from service.decoder import ImageDecoder
from service.errors import RequestInvalid, WorkerLost
from service.heap import keep_from_collector
from service.idempotency import Claims
from service.image_addresses import read_rule
from service.image_urls import ImageUrls
from service.images import ImageLimits
from service.keys import Keyring
from service.label_sets import LabelSets, Registered, load_built_in
from service.label_stores import FileStore, RedisStore, Store
from service.model_folder import ModelFolder
from service.model_loading import Loader
from service.model_specs import ModelSpecs
from service.models import Models
from service.plans import Plans, parse_defence
from service.probe_job import Job
from service.probe_ledger import Ledger
from service.rate_limits import Bill, Limiter, Meter
from service.redis_link import RedisLink
from service.remembered import Memory
from service.runtime import ServedEncoder, use_threads
from service.schemas import Options
from service.seal import Seal
from service.settings import Settings, SettingsInvalid
from service.supervisor import Supervisor
from service.urgency import BATCH, CURRENT, Urgency
from service.versions import holding

State = Literal["loading", "ready", "draining", "failed"]
# A text bank is large and slow to make: a look-up in Redis may take longer than for a score vector.
_BANK_SECONDS = 1.0


class Service:
    """Everything behind the routes.

    Args:
        settings: as read at start.
        on_fatal: called when an encoder cannot be loaded or a worker cannot be brought back, with the reason; the
            process should then end.
    """

    def __init__(self, settings: Settings, on_fatal: Callable[[IronclipError], None] | None = None) -> None:
        self.settings = settings
        self.state: State = "loading"
        self.image_limits = ImageLimits(
            settings.max_image_bytes, settings.max_pixels, settings.max_side, urls=bool(settings.image_url_hosts)
        )
        self.image_urls = ImageUrls(
            [read_rule(entry) for entry in settings.image_url_hosts],
            [ip_network(entry) for entry in settings.image_url_networks],
            plain=settings.image_url_http,
            limits=self.image_limits,
            seconds=settings.image_url_timeout_ms / 1000,
            most=settings.image_url_fetches,
        )
        self.label_limits = self._limits(settings.max_labels)
        self._on_fatal = on_fatal
        self._failure = ""
        self._loading: asyncio.Task[None] | None = None
        self._plans = Plans(self.label_limits, settings.max_views)
        self._warming: set[asyncio.Task[None]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._lag: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()
        self.supervisor = Supervisor(
            hang_seconds=settings.worker_timeout_seconds,
            restarts=settings.worker_restarts,
            on_given_up=self._give_up,
        )
        self.keys = self._read_keys()
        url = settings.redis_url
        self._link = RedisLink(url.get_secret_value(), settings.redis_timeout_ms / 1000) if url is not None else None
        self.limiter = Limiter(self._link, settings.redis_prefix)
        seal = Seal(settings.redis_mac_key.get_secret_value().encode(), b"label sets")
        store: Store = (
            RedisStore(
                self._link,
                settings.redis_prefix,
                settings.max_label_sets,
                seal,
                max_bytes=settings.max_label_set_bytes,
            )
            if self._link is not None
            else FileStore(settings.state_dir, settings.max_label_sets, settings.max_label_set_bytes)
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
            max_wait=settings.max_queue_ms / 1000,
        )
        self.supervisor.watch_decoder(self.decoder)
        vectors = settings.cache_bytes
        self.memory = Memory(self.encoder, self._registered, vectors // 8, settings.cache_ttl_seconds)
        self._caches = [
            self._cache("images", vectors // 8),
            self._cache("features", vectors // 4),
            self._cache("scores", vectors // 2),
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
        self.claims = Claims(
            self._link,
            settings.redis_prefix,
            settings.redis_mac_key.get_secret_value().encode(),
            self.probes.knows,
        )
        self.answers = Answers(self.decoder, images, features, scores, classifiers)
        self.specs = ModelSpecs(settings.models_dir, settings.model_specs)
        loader = Loader(settings, lambda: self.decoder.flowing)
        self.models = Models(settings, loader, self.supervisor, self._read_defences(), self._forget)
        folder = settings.models_dir
        self._folder = ModelFolder(folder, self.models, settings) if folder is not None else None

    async def start(self) -> None:
        """Begin to load the encoders; returns at once, `not_ready` tells when they are there."""
        telemetry.watch_ready(self.not_ready)
        telemetry.watch_decoder(self.decoder)
        if self._link is not None:
            await self._link.start()
        if self.keys is not None:
            self.keys.start()
        self._say_how_open()
        self._loading = asyncio.create_task(self._load())
        self._lag = asyncio.create_task(telemetry.watch_loop())
        self.supervisor.start()

    @property
    def lost(self) -> str:
        """Why the process should be started anew; empty while it should not."""
        return self.supervisor.given_up

    def drain(self) -> None:
        """Say no on /readyz from now on; requests are still answered."""
        if self.state != "failed":
            self.state = "draining"

    def end_probes(self) -> None:
        """Have every probe end with what it knows, so that whoever waits for it is answered before the end."""
        self.models.end_probes()

    async def stop(self) -> None:
        """Finish what is queued and let everything go."""
        self.drain()
        self.supervisor.stop()
        if self._loading is not None:
            self._loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loading
        for task in (*self._warming, *filter(None, [self._lag])):
            task.cancel()
        if self.keys is not None:
            await self.keys.stop()
        if self._folder is not None:
            await self._folder.stop()
        await self.models.stop()
        await self.probes.close()
        if self._settling:
            await asyncio.wait(self._settling, timeout=1)
        self.decoder.close()
        await self.image_urls.close()
        for cache in self._caches:
            await cache.flush()
        if self._link is not None:
            await self._link.close()

    def not_ready(self) -> str | None:
        """Why the service cannot answer, or None; from any thread."""
        reason = {"loading": "loading", "draining": "draining", "failed": self._failure}.get(self.state)
        if reason is None:
            ailing = self.supervisor.ailing()
            reason = f"a worker of {', '.join(ailing)} is not running or not moving" if ailing else None
        # Well before the process is ended for it: whoever sends requests is to send them elsewhere by then.
        if reason is None and self.decoder.hangs(self.supervisor.hang_seconds / 2):
            reason = "pictures are not being decoded: every thread for it is stuck"
        return reason

    def encoder(self, reference: str) -> ServedEncoder:
        """As `Catalogue.encoder`."""
        return self.models.encoder(reference)

    async def plan(self, options: Options, size: int = 0, *, tenant: str) -> Plan:
        """What a classification with these options means; kept for the next request that asks the same.

        `size` is what the options took in bytes as they came: large ones are not taken apart on the event loop.
        `tenant` is whose label sets and caches are used.

        Raises:
            IronclipError: an option, the labels or the tree cannot be used, or a name is not known.
        """
        if (options.labels is None) == (options.label_set is None):
            raise RequestInvalid("Give exactly one of labels and label_set.")
        served = self.encoder(options.encoder)
        name = options.label_set
        entry = await self.label_sets.get(name, tenant=tenant) if name is not None else None
        return await self._plans.get(served, options, entry, size, tenant)

    async def _registered(self, name: str, tenant: str) -> Registered:
        return await self.label_sets.get(name, tenant=tenant)

    def warm(self, entry: Registered, meter: Meter) -> None:
        """Begin to encode a newly registered set for the default encoder, before the first picture asks for it.

        The caller pays for it now instead of then, or if that is too much not now.
        """

        async def encode() -> None:
            CURRENT.set(Urgency(BATCH))  # it is no part of the request any more
            # Whatever is wrong with the set for this encoder, the request that uses it is told.
            with contextlib.suppress(IronclipError), holding():
                plan = await self.plan(Options(label_set=f"{entry.name}@{entry.digest}"), tenant=meter.caller.tenant)
                await self.answers.classifiers.bought(plan, meter)

        if self.state == "ready":
            task = asyncio.create_task(encode())
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    def settle(self, job: Job, bill: Bill) -> asyncio.Task[None]:
        """Wait for the end of a probe, and give back what it was paid with and did not use."""

        async def wait() -> None:
            await job.wait()
            await bill.settle(0 if job.status == "failed" else job.passes)

        task = asyncio.create_task(wait())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    def _read_keys(self) -> Keyring | None:
        """The API keys; raises SettingsInvalid."""
        path = self.settings.keys_file
        if path is None:
            return None
        try:
            return Keyring(path)
        except SettingsInvalid as error:
            raise SettingsInvalid(
                "\n".join(f"IRONCLIP_KEYS_FILE: {line}" for line in error.detail.splitlines())
            ) from None

    def _say_how_open(self) -> None:
        """Tell the log, once, whether keys are asked for, and what Redis has is believed."""
        if self.settings.redis_url is not None and not self.settings.redis_mac_key.get_secret_value():
            self._log.warning(
                "what is kept in Redis is not signed: whoever can write there can change answers; "
                "IRONCLIP_REDIS_MAC_KEY, the same on all replicas, ends that"
            )
        if self.keys is not None:
            self._log.info("API keys are asked for", keys_file=str(self.keys.path))
            return
        text = "no API keys: whoever reaches this address may ask for everything; IRONCLIP_KEYS_FILE closes it"
        loopback = self.settings.host in ("localhost", "::1") or self.settings.host.startswith("127.")
        (self._log.info if loopback else self._log.warning)(text, host=self.settings.host)

    def _read_defences(self) -> dict[str, Defence]:
        """Each encoder's own defence; raises SettingsInvalid."""
        found = {}
        for name, value in self.settings.defences.items():
            try:
                found[name] = self.read_defence(value)
            except (OptionError, TypeError, AttributeError) as error:
                raise SettingsInvalid(f"IRONCLIP_DEFENCES, {name}: {error}") from None
        return found

    def defence(self, served: ServedEncoder, value: Any) -> Defence:
        """As `Plans.defence`."""
        return self._plans.defence(served, value)

    def read_defence(self, value: Any) -> Defence:
        """An encoder's own defence as it is written in a request; raises OptionError."""
        return self._plans.checked(parse_defence(value))

    def _forget(self, served: ServedEncoder) -> None:
        self._plans.forget(served)
        self.answers.classifiers.forget(served)

    async def _load(self) -> None:
        use_threads(self.settings.threads)
        for name, spec in self.settings.encoders.items():
            fault = await self.models.first(name, spec, "settings")
            if fault is not None:
                self._fail(name, fault)
                return
        if self._folder is not None:
            await self._folder.start()
        if self.settings.default_name not in self.models.names:
            self._fail(self.settings.default_name, self._no_default())
        elif self.state == "loading":
            keep_from_collector()
            self.state = "ready"
            self._log.info("ready", encoders=self.models.names, default=self.settings.default_name)

    def _no_default(self) -> IronclipError:
        return UnknownEncoder(
            f"IRONCLIP_DEFAULT_ENCODER is {self.settings.default_name!r}, and no artifact of this name in "
            f"{self.settings.models_dir} could be loaded; there are: {', '.join(self.models.names)}."
        )

    def _fail(self, name: str, error: IronclipError) -> None:
        self.state, self._failure = "failed", f"the encoder {name!r} cannot be loaded ({error.code})"
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _give_up(self, reason: str) -> None:
        self.state, self._failure = "failed", reason
        if self._on_fatal is not None:
            self._on_fatal(WorkerLost(reason))

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
