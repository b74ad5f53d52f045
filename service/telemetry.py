"""What the service tells about itself: metrics, logs, and how long each stage of a request took.

Every metric label comes from a closed set, and no log line holds what a caller sent (not a label, not a text,
not a path as it was typed): both would grow without bound, and both outlive the request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, ref

import structlog
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics
from pydantic_core import to_json

from ironclip import __version__
from service import tracing, waits

if TYPE_CHECKING:
    from service.decoder import ImageDecoder
    from service.runtime import ServedEncoder

disable_created_metrics()  # type: ignore[no-untyped-call]
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# The stages of a request, in the order in which it passes through them; the labels of `ironclip_stage_seconds`.
# `queue` is the longest wait for a tower, `model` the rest of the time until it has answered.
STAGES = ("receive", "fetch", "cache", "decode", "labels", "queue", "model", "decide", "serialise")

_VERSION_LABELS = ("encoder", "digest")
DIGEST_DIGITS = 12
CODES = ("2xx", "3xx", "4xx", "5xx")
RESTARTS = ("died", "hung", "fails")

REQUESTS = Counter("ironclip_requests", "Requests answered.", ["op", "code"])
REQUEST_SECONDS = Histogram(
    "ironclip_request_seconds", "Time from the first byte to the answer.", ["op"], buckets=_LATENCY
)
STAGE_SECONDS = Histogram("ironclip_stage_seconds", "Time of one stage of a request.", ["stage"], buckets=_LATENCY)
_STAGES = {stage: STAGE_SECONDS.labels(stage) for stage in STAGES}
ERRORS = Counter("ironclip_errors", "Problems answered, by their stable code.", ["code"])
IN_FLIGHT = Gauge("ironclip_requests_in_flight", "Requests being worked on.")
DROPPED = Counter("ironclip_dropped", "Requests given up before an answer.", ["reason"])
REFUSED = Counter("ironclip_refused", "Requests that were not let in, by the limit that refused them.", ["limit"])
EXPIRED = Counter("ironclip_expired_items", "Items dropped unstarted, since their deadline had passed.", ["tower"])
WORKER_RESTARTS = Counter(
    "ironclip_worker_restarts", "Model workers started again, and why.", ["encoder", "tower", "reason"]
)
BATCH_LIMIT = Gauge(
    "ironclip_batch_limit", "Items that a batch may have; lower after memory did not suffice.", ["encoder", "tower"]
)
DECODE_SECONDS = Histogram(
    "ironclip_decode_seconds", "Time in which one image was checked, decoded and resized.", buckets=_LATENCY
)
DECODE_OLDEST = Gauge(
    "ironclip_decode_oldest_seconds",
    "For how long the decoder's thread that is at one image for longest has been at it; 0 while none has one.",
)
DECODE_REJECTS = Counter("ironclip_decode_rejects", "Images refused, by the problem's code.", ["reason"])
CACHE = Counter("ironclip_cache", "Look-ups in the caches.", ["cache", "result"])
CACHE_BYTES = Gauge("ironclip_cache_bytes", "Bytes held in this process.", ["cache"])
PROBES = Counter("ironclip_probes", "Probes ended.", ["outcome"])
PROBE_STEPS = Counter("ironclip_probe_steps", "Queries of probes answered, a draw counting as one.")
PROBE_FLIPS = Counter(
    "ironclip_probe_flip",
    "Probes ended with an answer, by the norm and the radius up to which the decision broke; `none`: nowhere.",
    ["norm", "eps"],
)
PROBES_RUNNING = Gauge("ironclip_probes_running", "Probes that run or wait.", ["encoder"])
REDIS_UP = Gauge(
    "ironclip_redis_up", "1 while Redis answers, 0 while it is left alone (circuit open), NaN where there is none."
)
REDIS_UP.set(math.nan)
REDIS_ERRORS = Counter("ironclip_redis_errors", "Calls to Redis that failed.", ["reason"])
KEYS = Gauge("ironclip_keys", "API keys in the keys file, the expired among them.")
KEYS_FILE_OK = Gauge(
    "ironclip_keys_file_ok",
    "0 while the keys file cannot be used and the keys stay as they were; NaN where there is none.",
)
KEYS_FILE_OK.set(math.nan)
KEYS_RELOADS = Counter("ironclip_keys_reloads", "Readings of a changed keys file.", ["result"])
RATE_LIMITS = Counter(
    "ironclip_rate_limits",
    "Requests of limited keys, by where their points were counted; `fallback`: in this process, while Redis is away.",
    ["store", "result"],
)
BATCH_SIZE = Histogram(
    "ironclip_batch_size", "Items in one forward pass.", ["tower"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
BATCH_PAD_RATIO = Histogram(
    "ironclip_batch_pad_ratio",
    "Share of a forward of the image tower that was filled up to a size that it is captured or compiled for.",
    buckets=(0, 0.1, 0.2, 0.3, 0.4, 0.5),
)
BATCH_SECONDS = Histogram("ironclip_batch_seconds", "Time of one forward pass.", ["tower"], buckets=_LATENCY)
QUEUE_SECONDS = Histogram("ironclip_queue_seconds", "Wait of a batch's oldest item.", ["tower"], buckets=_LATENCY)
QUEUE_ITEMS = Gauge("ironclip_queue_items", "Items waiting for a tower.", ["encoder", "tower"])
QUEUE_ESTIMATE = Gauge(
    "ironclip_queue_seconds_estimate", "How long an item that came now would wait.", ["encoder", "tower"]
)
STALLED = Gauge(
    "ironclip_worker_stalled_seconds",
    "Time since a worker that has work last moved; 0 when it has none.",
    ["encoder", "tower"],
)
LAST_PROGRESS = Gauge(
    "ironclip_worker_last_progress_timestamp_seconds",
    "When a worker last took or finished a batch, seconds since 1970; it stands still without work.",
    ["encoder", "tower"],
)
LOOP_LAG = Histogram(
    "ironclip_event_loop_lag_seconds", "How late the event loop wakes a task that sleeps.", buckets=_LATENCY
)
TRACE_SPANS = Counter("ironclip_trace_spans", "Spans given to the OpenTelemetry exporter.", ["result"])
IMAGE_URLS = Counter("ironclip_image_urls", "Images asked for by their URL.", ["result"])
IMAGE_URL_SECONDS = Histogram(
    "ironclip_image_url_seconds", "Time in which one image was fetched, or failed to be.", buckets=_LATENCY
)
MODEL_INFO = Gauge(
    "ironclip_model_info", "Encoders served, canaries left out; always 1.", ["name", "digest", "dtype", "head"]
)
MODEL_LOADS = Counter("ironclip_model_loads", "Loads of encoders ended, those at start among them.", ["outcome"])
CANARY_SHARE = Gauge("ironclip_canary_share", "Share of an encoder's requests that its canary gets.", _VERSION_LABELS)
CANARIES_ENDED = Counter("ironclip_canaries_ended", "Canaries that are none any more, and why.", ["outcome"])
BY_VERSION = Counter(
    "ironclip_requests_by_version",
    "Requests that asked an encoder, by the version that they got (front of its digest), and the answers' class.",
    [*_VERSION_LABELS, "code"],
)
BUILD_INFO = Gauge("ironclip_build_info", "The running version; always 1.", ["version"])
BUILD_INFO.labels(__version__).set(1)
READY = Gauge("ironclip_ready", "1 when /readyz says yes, or would if somebody asked it.")
_QUEUES: dict[str, Callable[[ServedEncoder], Any]] = {
    "image": attrgetter("images"),
    "text": attrgetter("texts"),
    "bank": attrgetter("banks"),
}
# An API key, or a data: URI as far as it goes.
_SECRETS = re.compile(r"ick_[A-Za-z0-9]{1,32}_[A-Za-z0-9_-]+|data:[A-Za-z0-9.+/;=_-]*,[^\s\"'\\]*")


@lru_cache(maxsize=4096)
def _request_series(op: str, status: int) -> tuple[Counter, Histogram]:
    return REQUESTS.labels(op, str(status)), REQUEST_SECONDS.labels(op)


def observe_request(op: str, status: int, seconds: float) -> None:
    """Count one request."""
    count, times = _request_series(op, status)
    count.inc()
    times.observe(seconds)


@lru_cache(maxsize=4096)
def _cache_series(cache: str, result: str) -> Counter:
    return CACHE.labels(cache, result)


def count_cache(cache: str, result: str, times: int = 1) -> None:
    """Count look-ups in a cache."""
    if times:
        _cache_series(cache, result).inc(times)


@lru_cache(maxsize=1024)
def _version_series(name: str, digest: str, status: int) -> Counter | None:
    code = f"{status // 100}xx"
    return BY_VERSION.labels(name, short(digest), code) if code in CODES else None


def count_version(name: str, digest: str, status: int) -> None:
    """Count a request by the version of an encoder that it was given."""
    series = _version_series(name, digest, status)
    if series is not None:
        series.inc()


def observe_batch(tower: str, items: int, seconds: float, waited: float) -> None:
    """Count one batch of the image or the text tower."""
    BATCH_SIZE.labels(tower).observe(items)
    BATCH_SECONDS.labels(tower).observe(seconds)
    QUEUE_SECONDS.labels(tower).observe(waited)


def watch_ready(not_ready: Callable[[], str | None]) -> None:
    """Let `ironclip_ready` be found out whenever the metrics are read; with several services in a process, the last's.

    Args:
        not_ready: a method of the service, which is not kept alive for it; called in whichever thread reads.
    """
    method = WeakMethod(not_ready)

    def ready() -> float:
        asked = method()
        return float(asked is not None and asked() is None)

    READY.set_function(ready)


def watch_decoder(decoder: ImageDecoder) -> None:
    """Let how the decoder stands be found out whenever the metrics are read; with several, the last's."""
    reference = ref(decoder)

    def asked(value: str) -> float:
        found = reference()
        return float(getattr(found, value)) if found is not None else 0.0

    DECODE_OLDEST.set_function(partial(asked, "oldest_seconds"))
    # Of no encoder: one decoder serves them all.
    QUEUE_ITEMS.labels("", "decode").set_function(partial(asked, "queued"))
    QUEUE_ESTIMATE.labels("", "decode").set_function(partial(asked, "estimated_wait_seconds"))


def watch_encoder(name: str, loaded: Callable[[], Sequence[ServedEncoder]]) -> None:
    """Let the queues of an encoder be read whenever the metrics are, those of all its loaded versions together."""

    def over(queues: Callable[[ServedEncoder], Any], value: str, join: Callable[[list[float]], float]) -> float:
        return join([getattr(queues(served), value) for served in loaded()] or [0.0])

    # "bank": prompts of label sets, which go to the text tower a few at a time.
    for tower, queue in _QUEUES.items():
        for gauge, value, join in (
            (QUEUE_ITEMS, "queued", sum),
            (QUEUE_ESTIMATE, "estimated_wait_seconds", max),
            (STALLED, "stalled_seconds", max),
        ):
            gauge.labels(name, tower).set_function(partial(over, queue, value, join))
        if tower != "bank":
            # There from the start: what appears with its first event has not risen, and no alert would see that one.
            BATCH_SECONDS.labels(tower)
            for reason in RESTARTS:
                WORKER_RESTARTS.labels(name, tower, reason)
            BATCH_LIMIT.labels(name, tower).set_function(partial(over, queue, "fits", min))
            LAST_PROGRESS.labels(name, tower).set_function(partial(over, queue, "last_progress_time", max))
    PROBES_RUNNING.labels(name).set_function(
        lambda: sum(served.prober.running for served in loaded() if served.prober is not None)
    )


def forget_encoder(name: str) -> None:
    """Publish nothing more of an encoder that is no longer served."""
    for tower in _QUEUES:
        for gauge in (QUEUE_ITEMS, QUEUE_ESTIMATE, STALLED, BATCH_LIMIT, LAST_PROGRESS):
            _remove(gauge, name, tower)
        for reason in RESTARTS:
            _remove(WORKER_RESTARTS, name, tower, reason)
    _remove(PROBES_RUNNING, name)


def show_stable(served: ServedEncoder) -> None:
    """Publish which version a name stands for."""
    MODEL_INFO.labels(*_info(served)).set(1)


def hide_stable(served: ServedEncoder) -> None:
    """The name stands for it no longer."""
    _remove(MODEL_INFO, *_info(served))


def short(digest: str) -> str:
    """The front of a digest, as metrics, versions of the Open Inference Protocol and the log have it."""
    return digest[:DIGEST_DIGITS]


def hide_canary(name: str, digest: str) -> None:
    """The version is no canary any more."""
    _remove(CANARY_SHARE, name, short(digest))


def forget_version(name: str, digest: str) -> None:
    """Publish nothing more of a version that has been unloaded."""
    for code in CODES:
        _remove(BY_VERSION, name, short(digest), code)
    _version_series.cache_clear()  # or what is counted under the same digest later would count for nothing


def _info(served: ServedEncoder) -> tuple[str, str, str, str]:
    return served.name, served.digest, served.dtype, served.encoder.head.type


def _remove(metric: Counter | Gauge, *labels: str) -> None:
    with suppress(KeyError):  # there is no such series
        metric.remove(*labels)


# Radii up to which breaks are counted together; closed, since every label is a series.
FLIP_BUCKETS = {"linf": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "l2": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)}


def flip_bucket(norm: str, broken_at: float | None) -> str:
    """The label of a probe that found a break at this radius, in the probe's own unit, or none (None)."""
    if broken_at is None:
        return "none"
    for bound in FLIP_BUCKETS[norm]:
        if broken_at <= bound:
            return f"{bound:g}/255" if norm == "linf" else f"{bound:g}"
    return "more"


async def watch_loop(pause: float = 0.25) -> None:
    """Measure how late the running event loop is, until cancelled."""
    while True:
        due = time.perf_counter() + pause
        await asyncio.sleep(pause)
        LOOP_LAG.observe(max(0.0, time.perf_counter() - due))


class Stages:
    """Seconds spent in each stage of one request, as the `Server-Timing` header tells them.

    Args:
        trace: of the request, where it is recorded: each stage becomes a span.
    """

    __slots__ = ("_trace", "seconds")

    def __init__(self, trace: tracing.Trace | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._trace = trace if trace is not None and trace.recorder is not None else None

    def add(self, stage: str, seconds: float) -> None:
        """Add to one of STAGES what has just ended; what is done side by side for one request counts once."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self._trace is not None:
            now = time.perf_counter()
            self._trace.note(tracing.Span(stage, now - seconds, now))

    def time(self, stage: str) -> AbstractContextManager[None]:
        """Time a block as part of one stage; what `model` waits for its turn goes to `queue`."""
        return self._timed(stage) if self._trace is None else self._traced(self._trace, stage)

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return _TimedModel(self, stage) if stage == "model" else _Timed(self, stage)

    @contextmanager
    def _traced(self, trace: tracing.Trace, stage: str) -> Iterator[None]:
        # No span for `queue`: whoever waited notes one itself.
        with self._timed(stage), tracing.stage(trace, stage):
            yield

    def observe(self) -> None:
        """Put the stages into the histogram; called once, when the answer goes out."""
        for stage, seconds in self.seconds.items():
            _STAGES[stage].observe(seconds)

    def header(self) -> str:
        """The `Server-Timing` value, durations in milliseconds."""
        return ", ".join([f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items()])


class _Timed:
    """A block whose time belongs to a stage; a class, since every answer from memory passes through it."""

    __slots__ = ("_stage", "_stages", "_start")

    def __init__(self, stages: Stages, stage: str) -> None:
        self._stages = stages
        self._stage = stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        seconds = self._stages.seconds
        seconds[self._stage] = seconds.get(self._stage, 0.0) + time.perf_counter() - self._start


class _TimedModel(_Timed):
    """The same for a block that asks a tower: a slow caller is to tell whether it waited or was computed for."""

    __slots__ = ("_token", "_wait")

    def __enter__(self) -> None:
        self._wait = waits.Wait()
        self._token = waits.CURRENT.set(self._wait)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        waits.CURRENT.reset(self._token)
        seconds, waited = self._stages.seconds, self._wait.seconds
        if waited is not None:
            waited = min(waited, time.perf_counter() - self._start)
            seconds["queue"] = seconds.get("queue", 0.0) + waited
            self._start += waited
        super().__exit__(*error)


def configure_logging(level: str, log_format: str) -> None:
    """Send our own and every library's log lines, in one form, to standard error.

    Our own lines go there directly: the way through `logging` would cost as much as the rest of a cached answer.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, _Clock(), _add_trace]
    # Not the renderer's own choice: with `rich` installed it prints every frame's locals, a caller's data among them.
    plain = structlog.dev.plain_traceback
    last: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(exception_formatter=plain), _redact]
    if not console:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json), _redact]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # Each request has a line of ours; uvicorn's would repeat it with the path as it was typed.
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("httpx", "httpcore", "urllib3", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Clock:
    """Put the time on a line, in UTC as RFC 3339 has it.

    The front part of it is made once a second: every request has a line, and to take a date apart costs as much as to
    write one.
    """

    def __init__(self) -> None:
        self._front = (0, "")

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        known, front = self._front  # read and put as one: lines are written in several threads
        if known != second:
            front = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._front = (second, front)
        event["timestamp"] = f"{front}.{rest // 1000:06d}Z"
        return event


def _add_trace(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the trace's id on every line that is written for a request."""
    trace = tracing.CURRENT.get()
    if trace is not None:
        event["trace_id"] = trace.context.trace_id
    return event


def _redact(logger: Any, method: str, line: Any) -> str:
    """Take API keys and pictures out of a finished line: an exception's text may hold one."""
    text = str(line)
    return _SECRETS.sub("[redacted]", text) if "ick_" in text or "data:" in text else text


def _to_json(event: dict[str, Any], **_: Any) -> str:
    return to_json(event, fallback=repr).decode()


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return the structured logger of the service."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
