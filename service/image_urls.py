"""Pictures that a request names by URL: fetched where `IRONCLIP_IMAGE_URL_HOSTS` allows it, and nowhere else.

The rules are in service/image_addresses.py. They are enforced where the connection is made: a name is resolved once,
every answer is looked at, and the connection goes to the very address that was, with the name for TLS and `Host`. A
name server that answers differently a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import anyio
import httpcore

from ironclip import __version__
from ironclip.errors import ImageTooLarge, IronclipError
from service import telemetry
from service.container import ImageLimits
from service.errors import ImageUrlFailed, ImageUrlRefused
from service.forms import Picture, off_loop, picture_from_bytes
from service.image_addresses import Denied, HostRule, IPNetwork, Location, may_dial, read_url

# Host and port -> addresses.
Resolve = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_TYPES = frozenset(
    {"", "application/octet-stream", "image/jpeg", "image/jpg", "image/pjpeg", "image/png", "image/webp"}
)
_KEPT_SECONDS = 15.0  # of a connection that nobody uses
_HEADERS = (
    ("User-Agent", f"ironclip/{__version__}"),
    ("Accept", "image/jpeg, image/png, image/webp"),
    ("Accept-Encoding", "identity"),
)


class _Failed(Exception):
    """The other side did not give a picture; the reason is one of a few words."""


class ImageUrls:
    """Fetches pictures.

    Args:
        rules: hosts that may be asked; none: no URL is fetched.
        networks: addresses that may be dialled though they are not global.
        plain: whether `http` is allowed too.
        limits: of a picture.
        seconds: for one picture in all: name, connection, redirects, body.
        most: pictures fetched at once.
        resolve: the name server; the system's if not given.
    """

    def __init__(
        self,
        rules: Sequence[HostRule],
        networks: Sequence[IPNetwork] = (),
        *,
        plain: bool = False,
        limits: ImageLimits,
        seconds: float = 5.0,
        most: int = 16,
        resolve: Resolve | None = None,
    ) -> None:
        self.rules, self.networks, self.plain = tuple(rules), tuple(networks), plain
        self.limits, self.seconds, self.most = limits, seconds, most
        # Of its own: a name server that hangs must not take the threads that others work in.
        self._names = ThreadPoolExecutor(most, thread_name_prefix="names")
        self._resolve = resolve or self._ask_system
        self._slots = asyncio.Semaphore(most)
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._log = telemetry.get_logger()

    async def pictures(self, given: Sequence[Picture], hold: Callable[[int], None]) -> list[Picture]:
        """The same pictures, those with a URL fetched; what cannot be fetched has its error.

        One request gets a quarter of the places at most, so that it does not keep the others waiting.

        Args:
            given: of one request.
            hold: told of the bytes that the request has come to hold; may raise.

        Raises:
            IronclipError: what `hold` raises.
        """
        places = asyncio.Semaphore(max(1, self.most // 4))

        async def fetch(url: str) -> bytes | IronclipError:
            async with places:
                return await self._fetch(url, hold)

        tasks = {one.url: asyncio.ensure_future(fetch(one.url)) for one in given if one.url}
        try:
            await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            raise
        return [await self._picture(one, tasks[one.url].result()) if one.url else one for one in given]

    async def close(self) -> None:
        """Let connections and threads go."""
        self._names.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            await self._pool.aclose()

    async def _picture(self, given: Picture, found: bytes | IronclipError) -> Picture:
        if isinstance(found, IronclipError):
            # A copy each: the same URL may stand in two places.
            error = type(found)(found.detail, pointer=given.pointer or None, limit=found.limit)
            return Picture(error=error, pointer=given.pointer)
        made: Picture = await off_loop(len(found), picture_from_bytes, found, None, self.limits, given.pointer)
        return made

    async def _fetch(self, url: str, hold: Callable[[int], None]) -> bytes | IronclipError:
        began = time.perf_counter()
        try:
            with anyio.fail_after(self.seconds):
                async with self._slots:
                    data = await self._follow(url, hold)
        except Denied as error:
            outcome, reason = "refused", error.reason
        except ImageTooLarge as error:
            telemetry.IMAGE_URLS.labels("too-large").inc()
            return error
        except IronclipError:
            raise
        except Exception as error:
            # Whatever the other side, its certificate or the network do is no fault of this service.
            outcome, reason = "failed", str(error) if isinstance(error, _Failed) else type(error).__name__
        else:
            telemetry.IMAGE_URLS.labels("fetched").inc()
            return data
        finally:
            telemetry.IMAGE_URL_SECONDS.observe(time.perf_counter() - began)
        telemetry.IMAGE_URLS.labels(outcome).inc()
        self._log.info("image not fetched", outcome=outcome, reason=reason)
        if outcome == "refused":
            return ImageUrlRefused(
                "This URL is not fetched. Send the picture itself, or ask the operator which URLs are "
                "(IRONCLIP_IMAGE_URL_HOSTS)."
            )
        return ImageUrlFailed(
            "The URL did not give a JPEG, PNG or WebP picture in time. Try again, or send the picture itself."
        )

    async def _follow(self, url: str, hold: Callable[[int], None]) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            place = read_url(url, self.rules, plain=self.plain)
            found = await self._get(place, hold)
            if isinstance(found, bytes):
                return found
            # Only joined here: it is read, and refused, as the first one was.
            url = urljoin(f"{place.scheme}://{place.header}{place.target}", found)
        raise _Failed("redirects")

    async def _get(self, place: Location, hold: Callable[[int], None]) -> bytes | str:
        """The picture's bytes, or where it is said to be."""
        url = httpcore.URL(
            scheme=place.scheme.encode(), host=place.host.encode(), port=place.port, target=place.target.encode()
        )
        waits = dict.fromkeys(("connect", "read", "write", "pool"), self.seconds)
        headers = [("Host", place.header), *_HEADERS]
        async with self._connections().stream("GET", url, headers=headers, extensions={"timeout": waits}) as answer:
            told = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in told:
                return told[b"location"]
            if answer.status != 200:
                raise _Failed("status")
            if told.get(b"content-type", "").partition(";")[0].strip().lower() not in _TYPES:
                raise _Failed("content-type")
            if told.get(b"content-encoding", "identity").strip().lower() != "identity":
                raise _Failed("content-encoding")
            length = told.get(b"content-length", "")
            if length.isascii() and length.isdigit():
                self._check(int(length[:20]))
            data = bytearray()
            async for chunk in answer.aiter_stream():
                data += chunk
                self._check(len(data))
                hold(len(chunk))
            return bytes(data)

    def _check(self, size: int) -> None:
        if size > self.limits.max_bytes:
            raise ImageTooLarge(
                f"The picture under the URL has more than {self.limits.max_bytes} bytes.", limit=self.limits.max_bytes
            )

    def _connections(self) -> httpcore.AsyncConnectionPool:
        """Made when first needed: reading the system's certificates takes a while."""
        if self._pool is None:
            # No proxy, no cookies, no authentication: httpcore knows none unless it is given one.
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=ssl.create_default_context(),
                max_connections=self.most,
                max_keepalive_connections=self.most,
                keepalive_expiry=_KEPT_SECONDS,
                network_backend=_Pinned(self._resolve, self.networks),
            )
        return self._pool

    async def _ask_system(self, host: str, port: int) -> list[str]:
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._names, ask)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were looked at, never to a name."""

    def __init__(self, resolve: Resolve, networks: Sequence[IPNetwork]) -> None:
        self._resolve, self._networks = resolve, networks
        self._dial = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve once; all of the answers must be allowed, or none of them is dialled."""
        addresses = await self._resolve(host, port)
        if not all(may_dial(address, self._networks) for address in addresses):
            raise Denied("address")
        fault: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._dial.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                fault = error
        raise fault

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await anyio.sleep(seconds)
