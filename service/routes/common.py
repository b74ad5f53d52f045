"""What the routes share: the service behind the app, the request's time, answers as JSON."""

from __future__ import annotations

import asyncio
import re
import sys
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from ironclip.errors import DeadlineExceeded, ImageError
from service import urgency
from service.errors import RequestInvalid
from service.forms import Picture
from service.headers import every, header
from service.keys import Caller
from service.rate_limits import PICTURE, Meter
from service.telemetry import Stages
from service.urgency import Urgency, rank_of

if TYPE_CHECKING:
    from ironclip.defences import Defence
    from service.answers import Item
    from service.core import Service
    from service.runtime import ServedEncoder

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

T = TypeVar("T")

_TIMEOUT_HEADER = b"x-request-timeout-ms"
# A tag in quotes, in which a comma ends nothing; many leave the quotes out.
_ETAG = re.compile(r'(W/)?(?:"([^"]*)"|([^\s,"]+))')


def service_of(request: Request) -> Service:
    """Return the service behind the app."""
    service: Service = request.scope["app"].state.service
    return service


def caller_of(request: Request) -> Caller:
    """Return who asks."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


def meter_of(request: Request) -> Meter:
    """Return what the request is paid with."""
    meter: Meter = request.scope["state"]["meter"]
    return meter


def stages_of(request: Request) -> Stages:
    """Return the request's stopwatch."""
    stages: Stages = request.scope["state"]["stages"]
    return stages


async def fetched(
    request: Request, pictures: Sequence[Picture], served: ServedEncoder | None = None, defence: Defence | None = None
) -> list[Picture]:
    """The request's pictures, with those that are URLs fetched; what cannot be fetched has its error.

    Args:
        request: whose pictures they are.
        pictures: as they came.
        served: the encoder that they are for: while it lets nobody in, nothing is fetched.
        defence: that stands before it.

    Raises:
        InputTooLarge, Overloaded: what was fetched is more than a request, or all of them, may hold.
        Overloaded, NotReady: the encoder would not let the pictures in.
    """
    urls = sum(bool(picture.url) for picture in pictures)
    if not urls:
        return list(pictures)
    if served is not None and defence is not None:
        # Only asked, not kept: a host that is slow would keep the room from others while the model idles.
        with served.room_for(urls, defence):
            pass
    with stages_of(request).time("fetch"):
        return await service_of(request).image_urls.pictures(pictures, request.state.hold)


def price_of(pictures: Sequence[Picture], defence: Defence) -> float:
    """What it costs to see pictures through a defence, in points.

    One that is known from before costs the same: a price that can be told beforehand, and tells nothing. One that is
    found to be none has no forwards, but to take it out of the request and look is work.
    """
    return PICTURE * sum(1 if picture.error is not None else defence.cost for picture in pictures)


def spared_of(pictures: Sequence[Picture], items: Sequence[Item], defence: Defence) -> float:
    """What comes back of that price for pictures that turned out to be none only after it was paid."""
    late = sum(
        picture.error is None and isinstance(item.error, ImageError)
        for picture, item in zip(pictures, items, strict=True)
    )
    return PICTURE * (defence.cost - 1) * late


def json_response(
    content: Any, stages: Stages | None = None, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return an answer as JSON, its writing timed."""
    start = time.perf_counter()
    body = to_json(content)
    if stages is not None:
        stages.add("serialise", time.perf_counter() - start)
    return Response(body, status, headers, "application/json")


def etags_in(request: Request, name: str) -> list[str]:
    """The tags in all lines of `if-match` or `if-none-match`, without their quotes.

    A weak one is as good as any to `if-none-match`. To `if-match` it is none of ours, which are all strong (RFC 9110,
    section 13.1.1): there it keeps its `W/`, and is no digest.
    """
    found = _ETAG.findall(every(request.scope, name.encode()))
    return [(weak if name == "if-match" else "") + (quoted or bare) for weak, quoted, bare in found if quoted or bare]


def etag_matches(request: Request, digest: str) -> bool:
    """Whether `If-None-Match` names this digest, or anything at all (`*`)."""
    return any(tag in ("*", digest) for tag in etags_in(request, "if-none-match"))


class Deadline:
    """When the request has to be answered: the caller's `X-Request-Timeout-Ms`, within the service's own limit.

    Made once for a request, at its beginning: it also sets the request's urgency, see `service.urgency`.

    Raises:
        RequestInvalid: the header is not a whole number above 0.
    """

    def __init__(self, request: Request) -> None:
        limit = service_of(request).settings.request_timeout_ms
        asked = header(request.scope, _TIMEOUT_HEADER)
        if asked is not None and not (asked.isascii() and asked.isdigit() and len(asked) < 12 and int(asked) > 0):
            raise RequestInvalid("X-Request-Timeout-Ms is a whole number of milliseconds above 0.")
        self.milliseconds = limit if asked is None else min(limit, int(asked))
        self._end = time.monotonic() + self.milliseconds / 1000
        # Every queue on the way sees it.
        urgency.CURRENT.set(Urgency(rank_of(header(request.scope, b"priority") or ""), self._end))
        self.request = request

    @classmethod
    def of(cls, request: Request) -> Deadline:
        """The request's, made now if it has none yet; raises RequestInvalid as the constructor does."""
        state = request.scope["state"]
        found: Deadline | None = state.get("deadline")
        if found is None:
            found = state["deadline"] = cls(request)
        return found

    @property
    def seconds_left(self) -> float:
        """Until the time is up."""
        return max(0.0, self._end - time.monotonic())

    def receiving(self) -> _Receiving:
        """Read the body inside: it has to arrive in time too. Raises DeadlineExceeded."""
        return _Receiving(self)

    async def received(self, receive: Callable[[], Coroutine[Any, Any, Message]]) -> bytes:
        """The whole body, which has to arrive in time.

        Only what has to be waited for gets a timer, which costs about as much as hashing a small picture; and nothing
        is read by the framework's generator, which costs that too.

        Raises:
            ClientDisconnect: it breaks off.
            DeadlineExceeded: the time is up.
        """
        began = time.perf_counter()
        parts: list[bytes] = []
        more = True
        while more:
            steps = receive().__await__()
            try:
                waits_for = next(steps)
            except StopIteration as here:
                more = _taken(here.value, parts)
                continue
            async with self.receiving():
                more = _taken(await _rest(steps, waits_for), parts)
                while more:
                    more = _taken(await receive(), parts)
            break
        else:
            stages_of(self.request).add("receive", time.perf_counter() - began)
        return b"".join(parts)

    async def within(self, work: Awaitable[T]) -> T:
        """Wait for the work, as long as there is time and somebody who waits for it; else cancel it.

        Call it after the body has been read. Work that has not begun is then never begun.

        Raises:
            DeadlineExceeded: the time is up.
            ClientDisconnect: the caller has gone.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(self.request))
        left = max(0.0, self._end - time.monotonic())
        try:
            done, _ = await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return self._result(task)
            if gone in done:
                raise ClientDisconnect()
            raise self.exceeded("The answer was not ready")
        finally:
            task.cancel()
            gone.cancel()

    def _result(self, task: asyncio.Future[T]) -> T:
        try:
            return task.result()
        except DeadlineExceeded as error:  # of a queue, which does not know how much was allowed
            error.limit = self.milliseconds
            raise

    def exceeded(self, what: str) -> DeadlineExceeded:
        """The error to raise; ``what`` begins its text."""
        return DeadlineExceeded(
            f"{what} within {self.milliseconds} ms; what had not begun was dropped. Allow more with "
            "X-Request-Timeout-Ms (the service's own limit is IRONCLIP_REQUEST_TIMEOUT_MS).",
            limit=self.milliseconds,
        )


class _Receiving:
    """The time in which a body arrives: no longer than its deadline, and a stage of its request."""

    __slots__ = ("_began", "_deadline", "_timeout")

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    async def __aenter__(self) -> None:
        self._began = time.perf_counter()
        self._timeout = timeout(self._deadline.seconds_left)
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except (TimeoutError, asyncio.TimeoutError):  # two before Python 3.11
            raise self._deadline.exceeded("The request had not arrived in full") from None
        finally:
            stages_of(self._deadline.request).add("receive", time.perf_counter() - self._began)


def _taken(message: Message, parts: list[bytes]) -> bool:
    """Whether there is more of a body after this message, whose part of it is kept."""
    if message["type"] == "http.disconnect":
        raise ClientDisconnect()
    parts.append(message.get("body", b""))
    return bool(message.get("more_body", False))


@types.coroutine
def _rest(steps: Generator[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Await what has been begun by hand, and waits for something."""
    while True:
        try:
            try:
                given = yield waits_for
            except BaseException as error:
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(given)
        except StopIteration as done:
            result: T = done.value
            return result


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
