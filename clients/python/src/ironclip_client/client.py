"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
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
from ironclip_client.sets import LabelSets
from ironclip_client.streams import ProbeStream
from ironclip_client.vectors import Embeddings
from ironclip_client.wire import Call

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")


class Client:
    """A client of one Ironclip service; share one among threads, and close it or use it in a `with`.

    Args:
        base_url: the service's address; IRONCLIP_URL if not given, else http://127.0.0.1:8000.
        api_key: sent as `Authorization: Bearer`; IRONCLIP_API_KEY if not given, else none.
        timeout: seconds for one call, all its tries together; the service is told of it too.
        retries: tries after the first at most, or a RetryPolicy.
        headers: sent with every request, as a gateway may want them.
        http: an httpx.Client for proxies, certificates and the like; it is left open.

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
        http: httpx.Client | None = None,
    ) -> None:
        self._config = Config.read(base_url, api_key, timeout, retries, headers)
        self._http = http or httpx.Client(limits=limits())
        self._own = http is None
        self.label_sets = LabelSets(self._send)

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._config.base_url

    @property
    def timeout(self) -> float:
        """Seconds for one call that names no time of its own."""
        return self._config.timeout

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    @overload
    def classify(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ClassifyOptions]
    ) -> Classification: ...
    @overload
    def classify(
        self,
        image: None = None,
        labels: Labels | None = None,
        *,
        images: Iterable[ImageSource],
        **options: Unpack[ClassifyOptions],
    ) -> Batch[Classification]: ...
    @takes(ClassifyOptions)
    def classify(
        self,
        image: ImageSource | None = None,
        labels: Labels | None = None,
        *,
        images: Iterable[ImageSource] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classification | Batch[Classification]:
        """Which of the labels fits the picture? For `images`, a list in which each has its answer or its error.

        Args:
            image: a path, bytes, an open file, a `data:` URI, or a picture of Pillow's.
            labels: to choose from: names, or `{"name", "prompts", "descriptions"}`; else give `label_set`.
            images: several, in place of `image`; as many as the service takes at once (64 if not set otherwise).
            **options: see ClassifyOptions.

        Raises:
            IronclipError: as `errors` has it; ImageError for one picture that cannot be used.
            OSError: a file cannot be read.
        """
        if image is not None and images is None:
            return self._send(calls.classify(image, labels, options))
        if images is not None and image is None:
            return self._send(calls.classify_several(images, labels, options))
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
    ) -> Iterator[Classification | IronclipError]:
        """Classify any number of pictures: outcomes come in order, and pictures are read as they are needed.

        Args:
            images: as for `classify`; may be a generator without an end.
            labels: as for `classify`.
            concurrency: requests under way at a time.
            batch: pictures in one request; fewer where they are large.
            **options: see ClassifyOptions.

        Yields:
            For each picture its Classification, or the error (ImageError, TooLarge) that kept it from one.

        Raises:
            IronclipError: what concerns a whole request, when it is its turn.
        """

        def ask(part: list[ImageSource]) -> list[Classification | IronclipError]:
            good, outcomes = many.readable(part)
            shares: many.Shares[Classification] = many.Shares(good)
            while pictures := shares.next():
                try:
                    found = self._send(calls.classify_several(pictures, labels, options))
                    shares.answered(found)
                except TooLarge as error:
                    shares.refused(error)
            return many.filled(outcomes, shares.found)

        many.checked(concurrency, "concurrency")
        return many.in_order(ask, many.parts(images, many.checked(batch, "batch")), concurrency)

    @takes(EmbedOptions)
    def embed(
        self, *, images: Iterable[ImageSource] = (), texts: Iterable[str] = (), **options: Unpack[EmbedOptions]
    ) -> Embeddings:
        """Vectors of pictures and texts: of length 1, their dot product is the cosine, but for some `embed_dtype`.

        Args:
            images: as for `classify`.
            texts: as they are; no template is put around them.
            **options: see EmbedOptions.

        Raises:
            IronclipError, OSError: as for `classify`.
        """
        return self._send(calls.embed(images, texts, options))

    @overload
    def probe(
        self,
        image: ImageSource,
        labels: Labels | None = None,
        *,
        wait: Literal[True] = True,
        **options: Unpack[ProbeOptions],
    ) -> ProbeResult: ...
    @overload
    def probe(
        self, image: ImageSource, labels: Labels | None = None, *, wait: Literal[False], **options: Unpack[ProbeOptions]
    ) -> ProbeStanding: ...
    @takes(ProbeOptions)
    def probe(
        self, image: ImageSource, labels: Labels | None = None, *, wait: bool = True, **options: Unpack[ProbeOptions]
    ) -> ProbeResult | ProbeStanding:
        """How easily is the decision about this picture fooled?

        A probe of up to 20 seconds is one request. A longer one is started and followed, which takes a service of one
        process, or one with Redis; it is cancelled when this call ends without its answer.

        Args:
            image: as for `classify`.
            labels: as for `classify`; a probe of the embedding needs none.
            wait: False starts it alone, as `probe_start`.
            **options: see ProbeOptions.

        Raises:
            IronclipError, OSError: as for `classify`.
        """
        if not wait:
            return self.probe_start(image, labels, **options)
        if calls.probe_seconds(options) <= calls.FITS_ONE_REQUEST:
            return self._send(calls.probe(image, labels, options, self.timeout))
        with self.probe_stream(image, labels, **options) as stream:
            return stream.result()

    @takes(ProbeOptions)
    def probe_stream(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ProbeOptions]
    ) -> ProbeStream:
        """A probe as it goes on: events to iterate over, resumed where the line breaks.

        Use it in a `with`: what is left before the end cancels the probe. It begins with the `with`, or with the
        first event asked for. Arguments are those of `probe`.
        """
        following = Following(self._config, calls.probe_timeout(options, self.timeout))
        return ProbeStream(self._http, self._send, following, calls.probe_start(image, labels, options))

    def probe_follow(self, id: str, *, timeout: float | None = None) -> ProbeStream:
        """Follow a probe that has been started; it is not cancelled by that. Raises NotFound when iterated over."""
        seconds = self.timeout if timeout is None else checked_seconds(timeout)
        return ProbeStream(self._http, self._send, Following(self._config, seconds, id), None)

    @takes(ProbeOptions)
    def probe_cost(
        self, image: ImageSource, labels: Labels | None = None, **options: Unpack[ProbeOptions]
    ) -> Mapping[str, Any]:
        """What such a probe may cost at most, without running it. Arguments are those of `probe`."""
        return self._send(calls.probe_cost(image, labels, options))

    @takes(ProbeOptions)
    def probe_start(
        self,
        image: ImageSource,
        labels: Labels | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Unpack[ProbeOptions],
    ) -> ProbeStanding:
        """Start a probe and return at once; ask for it by its id. It is sent again where its answer was lost.

        Args:
            image: as for `probe`.
            labels: as for `probe`.
            idempotency_key: asked again with the same one, the service answers with the probe that the first call
                began; a new one if not given, so that the tries of one call begin one probe.
            **options: see ProbeOptions.

        Raises:
            InvalidRequest: among others, the key came with another request before.
        """
        return self._send(calls.probe_start(image, labels, options, idempotency_key))

    @takes(CallOptions)
    def probe_get(self, id: str, **options: Unpack[CallOptions]) -> ProbeStanding:
        """How a probe stands; raises NotFound for one that is unknown, or forgotten since its end."""
        return self._send(calls.probe_get(id, options))

    @takes(CallOptions)
    def probes(
        self, *, limit: int | None = None, cursor: str | None = None, **options: Unpack[CallOptions]
    ) -> ProbeList:
        """The probes that can be asked for by their id, in brief, newest first; those of one's own tenant alone.

        Args:
            limit: of the probes in one answer; the service's own (100) if not given.
            cursor: the `cursor` of the list before, to go on behind it.
            **options: see CallOptions.
        """
        return self._send(calls.probe_list(limit, cursor, options))

    @takes(CallOptions)
    def probe_cancel(self, id: str, **options: Unpack[CallOptions]) -> None:
        """End a probe; one that has ended stays as it is. Raises NotFound."""
        self._send(calls.probe_cancel(id, options))

    @takes(CallOptions)
    def models(self, **options: Unpack[CallOptions]) -> Models:
        """What is served, and what every request may ask for."""
        return self._send(calls.models(options))

    @takes(CallOptions)
    def model(self, name: str = "default", **options: Unpack[CallOptions]) -> Model:
        """One encoder; raises NotFound."""
        return self._send(calls.model(name, options))

    @takes(CallOptions)
    def model_versions(self, name: str = "default", **options: Unpack[CallOptions]) -> ModelVersions:
        """How the versions of an encoder stand, also of one that is being loaded; raises NotFound."""
        return self._send(calls.model_versions(name, options))

    @takes(CallOptions)
    def model_load(
        self,
        name: str,
        spec: str,
        *,
        digest: str | None = None,
        defence: Defence | None = None,
        canary: float | None = None,
        **options: Unpack[CallOptions],
    ) -> ModelVersions:
        """Begin to load a version of an encoder beside what is served; `model_versions` tells how it goes.

        Args:
            name: of the encoder; it may be new.
            spec: what to load, as the service's operator allows it.
            digest: that it must have; where that is served already, nothing is loaded.
            defence: of requests that name none.
            canary: share of the name's requests that it is tried on; all of them if not given.
            **options: see CallOptions.

        Raises:
            Conflict: it is being loaded already.
            InvalidRequest, Forbidden: it may not be loaded.
        """
        return self._send(calls.model_load(name, spec, digest, defence, canary, options))

    @takes(CallOptions)
    def model_promote(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """Give the canary all requests; raises NotFound where there is none."""
        return self._send(calls.model_promote(name, options))

    @takes(CallOptions)
    def model_end_canary(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """Give the stable version all requests; raises NotFound where there is no canary."""
        return self._send(calls.model_end_canary(name, options))

    @takes(CallOptions)
    def model_unload(self, name: str, **options: Unpack[CallOptions]) -> ModelVersions:
        """Unload an encoder; raises Conflict for the default one and the last."""
        return self._send(calls.model_unload(name, options))

    def ready(self, *, timeout: float = 5.0) -> Readiness:
        """Whether the service can answer now, and if not why; asked once. That it does not answer is no error here."""
        try:
            return self._send(calls.ready(timeout))
        except IronclipError as error:
            if not_now(error):
                return Readiness(False, error.detail)
            raise

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Return when the service can answer; raises NotReady with the reason when the time is up."""
        end = time.monotonic() + checked_seconds(timeout)
        while not (state := self.ready(timeout=max(0.1, min(5.0, end - time.monotonic())))):
            if time.monotonic() >= end:
                raise NotReady(f"The service was not ready within {timeout:g} s: {state.reason}")
            time.sleep(READY_PAUSE)

    def _send(self, call: Call[T]) -> T:
        tries = Tries(self._config, call)
        while True:
            try:
                with self._http.stream(**tries.request()) as response:
                    body = bytearray()
                    for part in response.iter_bytes():
                        body += part
                        tries.check()
                return call.read(tries.reply(response, bytes(body)))
            except (httpx.HTTPError, IronclipError) as error:
                wait = tries.after(error)
            time.sleep(wait)
