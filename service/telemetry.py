"""What the service tells about itself: metrics, logs, and how long each stage of a request took.

Every metric label comes from a closed set, and no log line holds what a caller sent (not a label, not a text,
not a path as it was typed): both would grow without bound, and both outlive the request.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics
from pydantic_core import to_json

from ironclip import __version__

if TYPE_CHECKING:
    from service.runtime import ServedEncoder

disable_created_metrics()  # type: ignore[no-untyped-call]
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# The stages of a request, in the order in which it passes through them; the labels of `ironclip_stage_seconds`.
STAGES = ("receive", "cache", "decode", "labels", "model", "decide", "serialise")

REQUESTS = Counter("ironclip_requests", "Requests answered.", ["op", "code"])
REQUEST_SECONDS = Histogram(
    "ironclip_request_seconds", "Time from the first byte to the answer.", ["op"], buckets=_LATENCY
)
STAGE_SECONDS = Histogram("ironclip_stage_seconds", "Time of one stage of a request.", ["stage"], buckets=_LATENCY)
ERRORS = Counter("ironclip_errors", "Problems answered, by their stable code.", ["code"])
IN_FLIGHT = Gauge("ironclip_requests_in_flight", "Requests being worked on.")
DROPPED = Counter("ironclip_dropped", "Requests given up before an answer.", ["reason"])
DECODE_REJECTS = Counter("ironclip_decode_rejects", "Images refused, by the problem's code.", ["reason"])
CACHE = Counter("ironclip_cache", "Look-ups in the caches.", ["cache", "result"])
CACHE_BYTES = Gauge("ironclip_cache_bytes", "Bytes held in this process.", ["cache"])
PROBES = Counter("ironclip_probes", "Probes ended.", ["outcome"])
PROBE_STEPS = Counter("ironclip_probe_steps", "Queries of probes answered, a draw counting as one.")
PROBES_RUNNING = Gauge("ironclip_probes_running", "Probes that run or wait.", ["encoder"])
REDIS_UP = Gauge(
    "ironclip_redis_up", "1 while Redis answers, 0 while it is left alone (circuit open), NaN where there is none."
)
REDIS_UP.set(math.nan)
REDIS_ERRORS = Counter("ironclip_redis_errors", "Calls to Redis that failed.", ["reason"])
BATCH_SIZE = Histogram(
    "ironclip_batch_size", "Items in one forward pass.", ["tower"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
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
MODEL_INFO = Gauge("ironclip_model_info", "Encoders served; always 1.", ["name", "digest", "dtype", "head"])
BUILD_INFO = Gauge("ironclip_build_info", "The running version; always 1.", ["version"])
BUILD_INFO.labels(__version__).set(1)
READY = Gauge("ironclip_ready", "1 when /readyz says yes.")


def observe_batch(tower: str, items: int, seconds: float, waited: float) -> None:
    """Count one batch of the image or the text tower."""
    BATCH_SIZE.labels(tower).observe(items)
    BATCH_SECONDS.labels(tower).observe(seconds)
    QUEUE_SECONDS.labels(tower).observe(waited)


def watch_encoder(served: ServedEncoder) -> None:
    """Publish an encoder's identity, and let its queues be read whenever the metrics are."""
    encoder = served.encoder
    MODEL_INFO.labels(served.name, encoder.digest, served.dtype, encoder.head.type).set(1)
    # "bank": prompts of label sets, which go to the text tower a few at a time.
    for tower, queue in (("image", served.images), ("text", served.texts), ("bank", served.banks)):
        for gauge, value in (
            (QUEUE_ITEMS, "queued"),
            (QUEUE_ESTIMATE, "estimated_wait_seconds"),
            (STALLED, "stalled_seconds"),
        ):
            gauge.labels(served.name, tower).set_function(partial(getattr, queue, value))


def watch_prober(served: ServedEncoder) -> None:
    """Let the number of an encoder's probes be read whenever the metrics are."""
    prober = served.prober
    if prober is not None:
        PROBES_RUNNING.labels(served.name).set_function(lambda: prober.running)


class Stages:
    """Seconds spent in each stage of one request, as the `Server-Timing` header tells them."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Add to one of STAGES; what is done side by side for one request counts once."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Time a block as part of one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def observe(self) -> None:
        """Put the stages into the histogram; called once, when the answer goes out."""
        for stage, seconds in self.seconds.items():
            STAGE_SECONDS.labels(stage).observe(seconds)

    def header(self) -> str:
        """The `Server-Timing` value, durations in milliseconds."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())


def configure_logging(level: str, log_format: str) -> None:
    """Send our own and every library's log lines, in one form, to standard error.

    Our own lines go there directly: the way through `logging` would cost as much as the rest of a cached answer.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Not the renderer's own choice: with `rich` installed it prints every frame's locals, a caller's data among them.
    plain = structlog.dev.plain_traceback
    last: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    if not console:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]
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


def _to_json(event: dict[str, Any], **_: Any) -> str:
    return to_json(event, fallback=repr).decode()


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return the structured logger of the service."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
