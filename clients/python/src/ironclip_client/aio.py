"""The asynchronous client, for asyncio: the same methods as `Client`, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import httpx

from ironclip_client import calls, many
from ironclip_client.errors import IronclipError, NotReady, TooLarge, UsageError, not_now
from ironclip_client.following import Following
from ironclip_client.images import ImageSource
from ironclip_client.options import CallOptions, ClassifyOptions, Defence, EmbedOptions, Labels, ProbeOptions, takes
from ironclip_client.probes import ProbeList, ProbeResult, ProbeStanding
from ironclip_client.results import Batch, Classification, Model, Models, ModelVersions, Readiness
from ironclip_client.sending import READY_PAUSE, Config, RetryPolicy, Tries, checked_seconds, limits
from ironclip_client.sets import AsyncLabelSets
from ironclip_client.streams import AsyncProbeStream
from ironclip_client.vectors import Embeddings
from ironclip_client.wire import Call

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")


class AsyncClient:
    """A client of one Ironclip service for asyncio; share one among tasks, and close it or use it in `async with`.

    Args:
        base_url: the service's address; IRONCLIP_URL if not given, else http://127.0.0.1:8000.
        api_key: sent as `Authorization: Bearer`; IRONCLIP_API_KEY if not given, else none.
        timeout: seconds for one call, all its tries together; the service is told of it too.
        retries: tries after the first at most, or a RetryPolicy.
        headers: sent with every request, as a gateway may want them.
        http: an httpx.AsyncClient for proxies, certificates and the like; it is left open.

    Raises:
        UsageError: one of them cannot be used.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: RetryPolicy | int = 4,
        headers: Mapping[str, str] | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._config = Config.read(base_url, api_key, timeout, retries, headers)
        self._http = http or httpx.AsyncClient(limits=limits())
        self._own = http is None
        self.label_sets = AsyncLabelSets(self._send)

    @property
    def base_url(self) -> str:
        """As `Client.base_url`."""
        return self._config.base_url

    @property
    def timeout(self) -> float:
        """As `Client.timeout`."""
        return self._config.timeout

    async def aclose(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    @overload
    async def classify(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ClassifyOptions]
    ) -> Classification: ...
    @overload
    async def classify(
        self,
        image: None = None,
        labels: Labels | None = None,
        *,
        images: Iterable[ImageSource],
        **options: Unpack[ClassifyOptions],
    ) -> Batch[Classification]: ...
    @takes(ClassifyOptions)
    async def classify(
        self,
        image: ImageSource | None = None,
        labels: Labels | None = None,
        *,
        images: Iterable[ImageSource] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classification | Batch[Classification]:
        """As `Client.classify`."""
        if image is not None and images is None:
            return await self._prepared(calls.classify, image, labels, options)
        if images is not None and image is None:
            return await self._prepared(calls.classify_several, images, labels, options)
        raise UsageError("Give one image, or several as images=[...].")

    @takes(ClassifyOptions)
    def classify_many(
        self,
        images: Iterable[ImageSource],
        labels: Labels | None = None,
        *,
        concurrency: int = 8,
        batch: int = 8,
        **options: Unpack[ClassifyOptions],
    ) -> AsyncIterator[Classification | IronclipError]:
        """As `Client.classify_many`."""

        async def ask(part: list[ImageSource]) -> list[Classification | IronclipError]:
            good, outcomes = await asyncio.to_thread(many.readable, part)
            shares: many.Shares[Classification] = many.Shares(good)
            while pictures := shares.next():
                try:
                    found: Batch[Classification] = await self._prepared(
                        calls.classify_several, pictures, labels, options
                    )
                    shares.answered(found)
                except TooLarge as error:
                    shares.refused(error)
            return many.filled(outcomes, shares.found)

        many.checked(concurrency, "concurrency")
        return many.in_order_async(ask, many.parts(images, many.checked(batch, "batch")), concurrency)

    @takes(EmbedOptions)
    async def embed(
        self, *, images: Iterable[ImageSource] = (), texts: Iterable[str] = (), **options: Unpack[EmbedOptions]
    ) -> Embeddings:
        """As `Client.embed`."""
        return await self._prepared(calls.embed, images, texts, options)

    @overload
    async def probe(
        self,
        image: ImageSource,
        labels: Labels | None = None,
        *,
        wait: Literal[True] = True,
        **options: Unpack[ProbeOptions],
    ) -> ProbeResult: ...
    @overload
    async def probe(
        self, image: ImageSource, labels: Labels | None = None, *, wait: Literal[False], **options: Unpack[ProbeOptions]
    ) -> ProbeStanding: ...
    @takes(ProbeOptions)
    async def probe(
        self, image: ImageSource, labels: Labels | None = None, *, wait: bool = True, **options: Unpack[ProbeOptions]
    ) -> ProbeResult | ProbeStanding:
        """As `Client.probe`."""
        if not wait:
            return await self.probe_start(image, labels, **options)
        if calls.probe_seconds(options) <= calls.FITS_ONE_REQUEST:
            return await self._prepared(calls.probe, image, labels, options, self.timeout)
        # In a thread, as everywhere here: the picture may have to be read, and made a PNG of.
        async with await asyncio.to_thread(self.probe_stream, image, labels, **options) as stream:
            return await stream.result()

    @takes(ProbeOptions)
    def probe_stream(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ProbeOptions]
    ) -> AsyncProbeStream:
        """As `Client.probe_stream`."""
        following = Following(self._config, calls.probe_timeout(options, self.timeout))
        return AsyncProbeStream(self._http, self._send, following, calls.probe_start(image, labels, options))

    def probe_follow(self, id: str, *, timeout: float | None = None) -> AsyncProbeStream:
        """As `Client.probe_follow`."""
        seconds = self.timeout if timeout is None else checked_seconds(timeout)
        return AsyncProbeStream(self._http, self._send, Following(self._config, seconds, id), None)

    @takes(ProbeOptions)
    async def probe_cost(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ProbeOptions]
    ) -> Mapping[str, Any]:
        """As `Client.probe_cost`."""
        return await self._prepared(calls.probe_cost, image, labels, options)

    @takes(ProbeOptions)
    async def probe_start(
        self,
        image: ImageSource,
        labels: Labels | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[ProbeOptions],
    ) -> ProbeStanding:
        """As `Client.probe_start`."""
        return await self._prepared(calls.probe_start, image, labels, options, idempotency_key)

    @takes(CallOptions)
    async def probe_get(self, id: str, **options: Unpack[CallOptions]) -> ProbeStanding:
        """As `Client.probe_get`."""
        return await self._send(calls.probe_get(id, options))

    @takes(CallOptions)
    async def probes(
        self, *, limit: int | None = None, cursor: str | None = None, **options: Unpack[CallOptions]
    ) -> ProbeList:
        """As `Client.probes`."""
        return await self._send(calls.probe_list(limit, cursor, options))

    @takes(CallOptions)
    async def probe_cancel(self, id: str, **options: Unpack[CallOptions]) -> None:
        """As `Client.probe_cancel`."""
        await self._send(calls.probe_cancel(id, options))

    @takes(CallOptions)
    async def models(self, **options: Unpack[CallOptions]) -> Models:
        """As `Client.models`."""
        return await self._send(calls.models(options))

    @takes(CallOptions)
    async def model(self, name: str = "default", **options: Unpack[CallOptions]) -> Model:
        """As `Client.model`."""
        return await self._send(calls.model(name, options))

    @takes(CallOptions)
    async def model_versions(self, name: str = "default", **options: Unpack[CallOptions]) -> ModelVersions:
        """As `Client.model_versions`."""
        return await self._send(calls.model_versions(name, options))

    @takes(CallOptions)
    async def model_load(
        self,
        name: str,
        spec: str,
        *,
        digest: str | None = None,
        defence: Defence | None = None,
        canary: float | None = None,
        **options: Unpack[CallOptions],
    ) -> ModelVersions:
        """As `Client.model_load`."""
        return await self._send(calls.model_load(name, spec, digest, defence, canary, options))

    @takes(CallOptions)
    async def model_promote(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """As `Client.model_promote`."""
        return await self._send(calls.model_promote(name, options))

    @takes(CallOptions)
    async def model_end_canary(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """As `Client.model_end_canary`."""
        return await self._send(calls.model_end_canary(name, options))

    @takes(CallOptions)
    async def model_unload(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """As `Client.model_unload`."""
        return await self._send(calls.model_unload(name, options))

    async def ready(self, *, timeout: float = 5.0) -> Readiness:
        """As `Client.ready`."""
        try:
            return await self._send(calls.ready(timeout))
        except IronclipError as error:
            if not_now(error):
                return Readiness(False, error.detail)
            raise

    async def wait_ready(self, timeout: float = 120.0) -> None:
        """As `Client.wait_ready`."""
        end = time.monotonic() + checked_seconds(timeout)
        while not (state := await self.ready(timeout=max(0.1, min(5.0, end - time.monotonic())))):
            if time.monotonic() >= end:
                raise NotReady(f"The service was not ready within {timeout:g} s: {state.reason}")
            await asyncio.sleep(READY_PAUSE)

    async def _send(self, call: Call[T]) -> T:
        tries = Tries(self._config, call)
        while True:
            try:
                async with self._http.stream(**tries.request()) as response:
                    body = bytearray()
                    async for part in response.aiter_bytes():
                        body += part
                        tries.check()
                return call.read(tries.reply(response, bytes(body)))
            except (httpx.HTTPError, IronclipError) as error:
                wait = tries.after(error)
            await asyncio.sleep(wait)

    async def _prepared(self, prepare: Callable[..., Call[T]], *arguments: Any) -> T:
        # Pictures are read and encoded in a thread: the event loop has others to serve.
        return await self._send(await asyncio.to_thread(prepare, *arguments))
