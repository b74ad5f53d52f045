"""How close the service comes to what the machine can do: `python -m loadtests.bench_floor`.

Starts a service of its own on a free loopback port with random weights of a real architecture (same arithmetic as
the trained one), and measures in turns, several rounds: the bare tower (batch 32 and batch 1, in the dtype that the
service chose), decoding with open_clip's own transform, and `POST /embed` at several concurrencies with distinct
JPEGs. The floor is (cores - the client's own share) / (decode core-seconds + tower core-seconds) images a second;
latency at concurrency 1 is held against decode + one forward. The same share is also taken in CPU seconds, which
other work on the machine disturbs less. Writes JSON to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import json
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image

from loadtests.client import Load, closed_loop, cycle, fetch, post
from loadtests.machine import process_seconds, resident_mib
from loadtests.pictures import make_pictures
from loadtests.processes import NotStarted, free_port, ironclip, running
from loadtests.report import describe_run, write_result

# So small that a cycle through the distinct pictures never meets one that is still cached; the cache still works.
_CACHE_BYTES = 100_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Times:
    """Wall and CPU seconds of each repetition of one piece of work."""

    wall: list[float]
    cpu: list[float]

    def __add__(self, other: Times) -> Times:
        return Times(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Bare:
    """Bare costs of one stretch of time: a batch of 32, a batch of one, decoding one picture.

    Attributes:
        cores: that the batches ran on; a picture is decoded on one.
    """

    batch: Times
    single: Times
    decode: Times
    cores: int

    def __add__(self, other: Bare) -> Bare:
        return Bare(self.batch + other.batch, self.single + other.single, self.decode + other.decode, self.cores)

    def floor(self, cores: float) -> float:
        """Images a second that so many cores can do, all of them decoding and running the tower in batches of 32."""
        return cores / (statistics.median(self.decode.wall) + self.cores * statistics.median(self.batch.wall) / 32)

    def to_json(self) -> dict[str, float]:
        """Medians."""
        median = statistics.median
        return {
            "tower_batch_32_images_per_second": round(32 / median(self.batch.wall), 2),
            "tower_batch_32_core_ms": round(1000 * median(self.batch.cpu) / 32, 3),
            "tower_batch_1_ms": round(1000 * median(self.single.wall), 2),
            "decode_ms": round(1000 * median(self.decode.wall), 3),
            "decode_core_ms": round(1000 * median(self.decode.cpu), 3),
        }


class Raw:
    """The bare costs: open_clip's tower and open_clip's own picture transform, nothing of ours."""

    def __init__(self, model_name: str, dtype: str, cores: int) -> None:
        torch.set_num_threads(cores)
        self.cores = cores
        self.model = open_clip.create_model(model_name).eval().to(_DTYPES[dtype])
        config = open_clip.get_model_preprocess_cfg(self.model)
        self.transform = open_clip.image_transform(config["size"], is_train=False)
        side = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        self.pixels = torch.randn(32, 3, side, side, generator=torch.Generator().manual_seed(0)).to(_DTYPES[dtype])

    @torch.inference_mode()
    def tower(self, batch: int, seconds: float) -> Times:
        """Forwards of one batch, back to back for some seconds."""
        pixels = self.pixels[:batch]
        return _repeat(lambda: self.model.encode_image(pixels), seconds)

    def decode(self, pictures: Sequence[bytes], seconds: float) -> Times:
        """Decoding one picture after the other on one core."""
        following = cycle(pictures)
        return _repeat(lambda: self.transform(Image.open(io.BytesIO(following()))), seconds)

    def bare(self, pictures: Sequence[bytes], seconds: float) -> Bare:
        """All of it in about two thirds of so many seconds."""
        third = seconds / 3
        return Bare(self.tower(32, third), self.tower(1, third / 2), self.decode(pictures, third / 2), self.cores)


def _repeat(work: Callable[[], object], seconds: float) -> Times:
    work()
    times = Times([], [])
    stop = time.perf_counter() + seconds
    while not times.wall or time.perf_counter() < stop:
        cpu, began = time.process_time(), time.perf_counter()
        work()
        times.wall.append(time.perf_counter() - began)
        times.cpu.append(time.process_time() - cpu)
    return times


@contextlib.contextmanager
def service(model_name: str, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Run a service process; yields its port and process id once it is ready."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command, environment = ironclip(
            f"bench=random:{model_name}", port, Path(folder) / "state", cache_bytes=_CACHE_BYTES
        )
        environment |= dict(pair.split("=", 1) for pair in options.set)
        try:
            with running(command, port, Path(folder) / "log", environment=environment) as server:
                yield port, server.process.pid
        except NotStarted as error:
            raise SystemExit(f"The service {error}") from None


def measure_round(
    raw: Raw, pictures: Sequence[bytes], port: int, pid: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One round over everything: bare tower, decoding, then each concurrency, the bare tower once more."""
    following = cycle([post("/embed?encoding_format=base64", picture, "image/jpeg") for picture in pictures])

    spent = functools.partial(process_seconds, pid)

    # Bare and served in turns, so that a number is held against bare ones of the same minute: other work on the
    # machine comes and goes.
    bares, served = [raw.bare(pictures, options.seconds)], {}
    for concurrency in options.concurrency:
        load = asyncio.run(closed_loop(port, following, concurrency, options.seconds, spent))
        bares.append(raw.bare(pictures, options.seconds))
        served[str(concurrency)] = compare(load, bares[-2] + bares[-1])
    together = functools.reduce(operator.add, bares)
    return {"raw": together.to_json(), "embed": served, "service_resident_mib": resident_mib(pid)}


def compare(load: Load, bare: Bare) -> dict[str, float]:
    """What one closed loop saw, against the floor: by the clock, and by CPU time."""
    median = statistics.median
    decode, single = median(bare.decode.wall), median(bare.single.wall)
    floor = bare.floor(bare.cores - load.client_cores)
    core_seconds = load.server_cpu_seconds / max(1, len(load.latencies))
    return {
        "images_per_second": round(load.rate, 2),
        "p50_ms": round(1000 * load.percentile(0.5), 2),
        "p99_ms": round(1000 * load.percentile(0.99), 2),
        "client_cores": round(load.client_cores, 3),
        "floor_images_per_second": round(floor, 2),
        "share_of_floor": round(load.rate / floor, 3),
        "latency_over_decode_and_forward": round(load.percentile(0.5) / (decode + single), 3),
        "service_core_ms": round(1000 * core_seconds, 2),
        "share_of_floor_by_cpu_time": round((median(bare.decode.cpu) + median(bare.batch.cpu) / 32) / core_seconds, 3),
    }


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median of each number over the rounds."""
    first = rounds[0]
    summary: dict[str, Any] = {}
    for key, value in first.items():
        values = [one[key] for one in rounds]
        summary[key] = summarise(values) if isinstance(value, dict) else round(statistics.median(values), 3)
    return summary


def show(size: str, number: int | str, result: dict[str, Any]) -> None:
    """Print one round, or the medians, in a few lines."""
    raw = result["raw"]
    print(
        f"{size} {number}: bare tower {raw['tower_batch_32_images_per_second']} images/s at batch 32, "
        f"{raw['tower_batch_1_ms']} ms at batch 1; decode {raw['decode_ms']} ms"
    )
    for concurrency, served in result["embed"].items():
        print(
            f"  c{concurrency}: {served['images_per_second']} images/s = {served['share_of_floor']:.0%} of the floor "
            f"{served['floor_images_per_second']}; p50 {served['p50_ms']} ms "
            f"(x{served['latency_over_decode_and_forward']}), p99 {served['p99_ms']} ms; "
            f"client {served['client_cores']} cores; {served['service_core_ms']} core-ms an image = "
            f"{served['share_of_floor_by_cpu_time']:.0%} of the floor by CPU time",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parse(argv)
    torch.manual_seed(options.seed)
    report: dict[str, Any] = {
        **describe_run("bench_floor", argv),
        "seed": options.seed,
        "model": f"{options.model}, random weights",
        "seconds": options.seconds,
        "sizes": {},
    }
    with service(options.model, options) as (port, pid):
        model = json.loads(asyncio.run(fetch(port, "/models/default")))
        report["dtype"] = model["dtype_report"]
        chosen = model["dtype_report"]["chosen"]
        raw = Raw(options.model, chosen, options.cores)
        print(f"dtype {chosen}, {options.cores} cores", flush=True)
        for size in options.sizes:
            width, height = (int(side) for side in size.split("x"))
            pictures = make_pictures((width, height), options.pictures, options.seed)
            rounds = []
            for number in range(1, options.rounds + 1):
                rounds.append(measure_round(raw, pictures, port, pid, options))
                show(size, number, rounds[-1])
            medians = summarise(rounds)
            show(size, "median", medians)
            kib = round(sum(map(len, pictures)) / len(pictures) / 1024, 1)
            report["sizes"][size] = {"kib_per_picture": kib, "median": medians, "rounds": rounds}
    write_result(options.name, report)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_floor", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture")
    parser.add_argument("--sizes", nargs="+", default=["224x224", "640x480"], help="pictures, WIDTHxHEIGHT")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=512, help="distinct pictures of each size")
    parser.add_argument("--cores", type=int, default=cores, help="cores that client and service share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the service")
    parser.add_argument("--name", default="bench_floor", help="of the result file; empty to write none")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
