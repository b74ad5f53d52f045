"""One peer, from its start to its end: equal features first, then speed, cost, overload and faults."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
import operator
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from loadtests import open_loop
from loadtests.bench_floor import Bare, Raw, compare
from loadtests.client import Refused, Reply, ask, closed_loop, cycle
from loadtests.open_loop import Plan
from loadtests.peers.registry import Peer, Start, Vector
from loadtests.pictures import half_repeated, make_pictures, truncate
from loadtests.processes import NotStarted, Running, free_port, published, running

# Cosine with open_clip's own features in float32 that every answer must have.
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999}
CONCURRENCY = (1, 8, 32)
# How often each server is asked where all are there at once, and the pause after each: who is not told that its callers
# are gone finishes what they asked for.
TURNS = 8
_PAUSE = 2.0
# Open-loop rates as shares of one floor, so that they are the same for all; nobody keeps up with the last.
LOADS = {"0.5x floor": 0.5, "0.8x floor": 0.8, "2x floor": 2.0}
_PATIENCE = 10.0
_CHECKED = 4
_IN_FLIGHT = 8
_ANSWER_SECONDS = 30.0
_STOP_SECONDS = 30.0
_RECOVERY_SECONDS = 30.0
_HUNG_SECONDS = 180.0


class Disagrees(Exception):
    """A peer's features are not those of the model, or are not there."""


# What may go wrong with a peer, and is its result.
TROUBLE = (NotStarted, Disagrees, Refused, OSError, EOFError, RuntimeError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Options:
    """How everyone is measured: the same for all.

    Attributes:
        seconds: of each measurement.
        cores: that client and server share.
        server_cpus: cores of the server; all if empty.
        deadlines: seconds of goodput, by dtype.
    """

    model: str
    size: tuple[int, int]
    pictures: int
    seed: int
    seconds: float
    cores: int
    threads: int
    server_cpus: tuple[int, ...]
    deadlines: dict[str, float]


class Bench:
    """Pictures, the bare tower in each dtype, and what its features are."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._raws: dict[str, Raw] = {}
        self._floors: dict[str, float] = {}
        # Sent in the order of a circle: whoever keeps answers has forgotten a picture when its turn comes again.
        self.pictures = make_pictures(options.size, options.pictures, options.seed)
        self.repeated = half_repeated(make_pictures(options.size, options.pictures, options.seed + 3), options.seed)
        self.truncated = truncate(make_pictures(options.size, 1, options.seed + 1)[0])
        odd = make_pictures((320, 240), _CHECKED, options.seed + 2)  # another size: resizing and cropping agree, too
        self.checked = [*self.pictures[:_CHECKED], *odd]
        self.expected = self._features()

    def raw(self, dtype: str) -> Raw:
        """The bare tower in a dtype, with the weights that everyone serves."""
        if dtype not in self._raws:
            torch.manual_seed(0)
            self._raws[dtype] = Raw(self.options.model, dtype, self.options.cores)
        return self._raws[dtype]

    def _bare(self, dtype: str) -> Bare:
        """Decoding and the tower as they are here and now, with nobody served."""
        return self.raw(dtype).bare(self.pictures, self.options.seconds)

    def floor(self, dtype: str) -> float:
        """Images a second that the cores can do, timed once, while no server is there: the rates are shares of it."""
        if dtype not in self._floors:
            bare = self._bare(dtype) + self._bare(dtype)
            self._floors[dtype] = bare.floor(bare.cores)
        return self._floors[dtype]

    def _features(self) -> Vector:
        raw = self.raw("float32")
        with torch.inference_mode():
            pixels = [raw.transform(Image.open(io.BytesIO(picture))) for picture in self.checked]
            features: Vector = normalize(raw.model.encode_image(torch.stack(pixels)), dim=-1).numpy()
        return features

    @contextlib.contextmanager
    def started(self, peer: Peer, dtype: str, **settings: object) -> Iterator[Running]:
        """Start a peer, and see that its features are right; `ready_seconds` counts to its first right answer.

        Raises:
            NotStarted: it did not start.
            Disagrees: its features are others.
        """
        with TemporaryDirectory() as name:
            folder, options = Path(name), self.options
            start = Start(peer.python, free_port(), options.model, dtype, options.threads, folder, settings)
            began = time.monotonic()
            with running(
                peer.command(start),
                start.port,
                folder / "log",
                ready=peer.ready,
                environment=peer.environment(start),
                cpus=options.server_cpus,
            ) as server:
                asyncio.run(self._agrees(peer, server.port, dtype, 1))
                server.ready_seconds = time.monotonic() - began
                yield server

    async def _agrees(self, peer: Peer, port: int, dtype: str, count: int) -> float:
        least = 1.0
        for picture, expected in zip(self.checked[:count], self.expected[:count], strict=True):
            reply = await ask(port, peer.request(picture))
            least = min(least, cosine(peer, reply, expected))
        if least < LEAST_COSINE[dtype]:
            raise Disagrees(f"cosine {least:.6f} with open_clip in float32, at least {LEAST_COSINE[dtype]} is asked")
        return least

    def agreement(self, peer: Peer, port: int, dtype: str) -> float:
        """The least cosine over the checked pictures.

        Raises:
            Disagrees: it is too low.
        """
        return asyncio.run(self._agrees(peer, port, dtype, len(self.checked)))

    def speed(self, peer: Peer, dtype: str) -> dict[str, Any]:
        """Everything about a peer that has a time or a size."""
        seconds = self.options.seconds
        floor = self.floor(dtype)
        with self.started(peer, dtype) as server:

            def bare() -> Bare:
                time.sleep(_PAUSE)  # a batch that is stopped half-way would look like a slow one to who times it
                with _paused([server]):  # some use the cores without being asked
                    return self._bare(dtype)

            result: dict[str, Any] = {"ready_seconds": round(server.ready_seconds, 2)}
            result["least_cosine"] = round(self.agreement(peer, server.port, dtype), 6)
            result["idle"] = _memory(server)
            spent = server.tree.counter()
            asked = _CHECKED  # those before were asked for already

            def fresh() -> bytes:
                nonlocal asked
                asked += 1
                return requests[(asked - 1) % len(requests)]

            requests = [peer.request(picture) for picture in self.pictures]
            repeated = cycle([peer.request(picture) for picture in self.repeated])
            bares, served = [bare()], {}
            for name, clients, following in [
                *((str(count), count, fresh) for count in CONCURRENCY),
                ("32 half repeated", 32, repeated),
            ]:
                looped = closed_loop(server.port, following, clients, seconds, spent, patient=True)
                load = asyncio.run(asyncio.wait_for(looped, seconds + _HUNG_SECONDS))
                bares.append(bare())
                served[name] = {**compare(load, bares[-2] + bares[-1]), "p95_ms": _ms(load.percentile(0.95))}
                served[name]["refused"] = load.refused
            result["closed"] = served
            together = functools.reduce(operator.add, bares)
            result["raw"] = together.to_json()
            result["rates_of"] = round(floor, 3)
            result["open"], asked, last = self._open(peer, server, dtype, floor, asked)
            result["recovery_seconds"] = asyncio.run(self._recovery(peer, server.port, dtype, asked, last))
            result["loaded"] = _memory(server)
            result["processes"] = len(server.tree.alive())
        return result

    def turns(self, peers: Sequence[Peer], dtype: str) -> dict[str, Any]:
        """Throughput of 32 clients, all servers started at once and asked in turns: the machine's drift hits all alike.

        Those who wait for their turn are stopped meanwhile: some use the cores without being asked.
        """
        clients, seconds = CONCURRENCY[-1], self.options.seconds
        failed: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            servers: dict[str, Running] = {}
            for peer in peers:
                try:
                    servers[peer.name] = stack.enter_context(self.started(peer, dtype))
                except TROUBLE as error:
                    failed[peer.name] = published(f"{type(error).__name__}: {error}")
            following = {
                peer.name: cycle([peer.request(picture) for picture in self.pictures])
                for peer in peers
                if peer.name in servers
            }
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for turn in range(TURNS):
                shift = turn % max(1, len(servers))
                for name in [*servers][shift:] + [*servers][:shift]:
                    with _paused(server for other, server in servers.items() if other != name):
                        spent = servers[name].tree.counter()
                        looped = closed_loop(servers[name].port, following[name], clients, seconds, spent, patient=True)
                        load = asyncio.run(asyncio.wait_for(looped, seconds + _HUNG_SECONDS))
                        rates[name].append(round(load.rate, 2))
                        time.sleep(_PAUSE)
        return {"clients": clients, "images_per_second": rates, "out": failed}

    def _open(
        self, peer: Peer, server: Running, dtype: str, floor: float, asked: int
    ) -> tuple[dict[str, Any], int, float]:
        """Goodput within the deadline at rates that are shares of the floor; callers hang up after ten seconds.

        Returns it, how many pictures have been asked for by then, and when the last of them was due (monotonic).
        """
        deadline, seconds = self.options.deadlines[dtype], self.options.seconds
        last = 0.0
        requests = [_with_deadline(peer, peer.request(picture), deadline) for picture in self.pictures]
        found = {}
        for number, (name, share) in enumerate(LOADS.items()):
            seed = self.options.seed + number
            plan = Plan(server.port, requests, share * floor, seconds, seed, _PATIENCE, first=asked)
            outcomes = open_loop.run(plan)
            # The last answer is there now; the last request was due so much earlier.
            ended = max((one.due + one.latency for one in outcomes), default=0.0)
            last = time.monotonic() - ended + max((one.due for one in outcomes), default=0.0)
            asked += len(outcomes)
            found[name] = open_loop.summarise(outcomes, plan, deadline, warm=seconds / 5)
        return found, asked, last

    async def _recovery(self, peer: Peer, port: int, dtype: str, asked: int, last: float) -> float | None:
        """Seconds after an overload's last request until one alone is answered within the deadline again.

        Each try is for another picture: whoever keeps answers is to make a new one.
        """
        began = time.monotonic()
        for number in itertools.count(asked):
            if time.monotonic() - began > _RECOVERY_SECONDS:
                break
            sent = time.monotonic()
            picture = self.pictures[number % len(self.pictures)]
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.TimeoutError):
                reply = await ask(port, peer.request(picture), self.options.deadlines[dtype])
                if reply.status == 200:
                    return round(sent - last, 2)
            await asyncio.sleep(0.1)
        return None

    def faults(self, peer: Peer, dtype: str) -> dict[str, Any]:
        """A truncated picture among good ones, and SIGTERM with requests in flight; a start for each."""
        with self.started(peer, dtype) as server:
            truncated = asyncio.run(self._beside_truncated(peer, server.port))
        with self.started(peer, dtype) as server:
            stopped = asyncio.run(self._stopped(peer, server))
        return {"truncated": truncated, "sigterm": stopped}

    async def _beside_truncated(self, peer: Peer, port: int) -> dict[str, Any]:
        requests = [peer.request(picture) for picture in self.checked]
        requests.insert(len(requests) // 2, peer.request(self.truncated))
        replies = await asyncio.gather(*(_status(port, request, _ANSWER_SECONDS) for request in requests))
        bad = replies.pop(len(requests) // 2)
        after: float | None = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.TimeoutError, Disagrees):
            reply = await ask(port, requests[0], _ANSWER_SECONDS)
            after = cosine(peer, reply, self.expected[0])
        return {
            "status": bad,
            "beside": len(replies),
            "beside_answered": sum(status == 200 for status in replies),
            "next_answered": after is not None and after >= 0.99,
            "says_ready_after": await _status(port, f"GET {peer.ready} HTTP/1.1\r\nHost: bench\r\n\r\n".encode(), 5)
            == 200,
        }

    async def _stopped(self, peer: Peer, server: Running) -> dict[str, Any]:
        requests = [peer.request(picture) for picture in self.pictures[:_IN_FLIGHT]]
        flying = [asyncio.ensure_future(_status(server.port, request, _STOP_SECONDS)) for request in requests]
        await asyncio.sleep(0.05)
        gone = await asyncio.to_thread(server.terminate, _STOP_SECONDS)
        statuses = await asyncio.gather(*flying)
        return {
            "in_flight": len(statuses),
            "answered": sum(status == 200 for status in statuses),
            "gone_seconds": None if gone is None else round(gone, 2),
        }


async def _status(port: int, request: bytes, seconds: float) -> int:
    """The answer's status; 0 for a connection that broke, -1 where none came."""
    try:
        return (await ask(port, request, seconds)).status
    except (TimeoutError, asyncio.TimeoutError):
        return -1
    except (OSError, asyncio.IncompleteReadError):
        return 0


def cosine(peer: Peer, reply: Reply, expected: Vector) -> float:
    """The cosine of an answer's vector with another.

    Raises:
        Disagrees: it is no answer with a vector of that length.
    """
    try:
        vector = peer.vector(reply.body) if reply.status == 200 else None
    except (ValueError, KeyError, IndexError, TypeError):
        vector = None
    if vector is None or vector.shape != expected.shape:
        raise Disagrees(f"answered {reply.status} with no vector of {len(expected)} numbers: {reply.body[:300]!r}")
    return float(vector @ expected / (np.linalg.norm(vector) * np.linalg.norm(expected)))


def _with_deadline(peer: Peer, request: bytes, deadline: float) -> bytes:
    """Tell the deadline to who can be told: ours alone has a header for it."""
    if peer.name != "ironclip":
        return request
    head, _, rest = request.partition(b"\r\n")
    return b"%s\r\nX-Request-Timeout-Ms: %d\r\n%s" % (head, round(1000 * deadline), rest)


@contextlib.contextmanager
def _paused(servers: Iterable[Running]) -> Iterator[None]:
    """Servers whose processes are not run meanwhile."""
    trees = [server.tree for server in servers]
    try:
        for tree in trees:
            tree.send(signal.SIGSTOP)
        yield
    finally:
        for tree in trees:
            tree.send(signal.SIGCONT)


def _memory(server: Running) -> dict[str, int]:
    found = server.tree.memory()
    return {"mib": round(found.once), "pss_mib": round(found.pss)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
