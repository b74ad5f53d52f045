"""What answers from the cache cost: `python -m loadtests.bench_hits`.

Starts a service and, on the same HTTP server, an empty route that receives and hashes the same body; asks both for the
same pictures in turns, several rounds. The aim: at least 70 % of the empty route's throughput. The empty route is bare
ASGI; the same as a FastAPI route is measured beside it, to tell the framework's share. The client's own cores are in
the result: a client that is the slowest of all makes them look alike, and CPU seconds a request do not know it. Writes
JSON to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtests.client import Load, Refused, closed_loop, cycle, post
from loadtests.pictures import make_pictures, parse_size
from loadtests.processes import NotStarted, Running, free_port, ironclip, running
from loadtests.report import describe_run, write_result

LABELS = [f"label {i}" for i in range(20)]
_UVICORN = (sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--no-access-log")
ROUTES = {"embed": "/embed?encoding_format=base64", "classify": "/classify?label_set=bench&top_k=5"}


def fill(url: str, route: str, pictures: Sequence[bytes]) -> None:
    """Ask for each picture until its answer comes from the cache.

    Raises:
        Refused: one does not, even the second time.
    """
    with httpx.Client(base_url=url, timeout=60) as client:
        client.put("/label-sets/bench", json={"labels": LABELS}).raise_for_status()
        for picture in pictures:
            for _ in range(2):
                answer = client.post(route, content=picture, headers={"Content-Type": "image/jpeg"})
                answer.raise_for_status()
            if "hit" not in answer.headers["Cache-Status"]:
                raise Refused(f"the second answer to the same picture is no hit: {answer.headers['Cache-Status']}")


def measure(servers: Sequence[Running], route: str, pictures: list[bytes], options: Any) -> dict[str, float]:
    """One round of one route: the service, the empty route, and that within the framework."""
    following = cycle([post(route, picture, "image/jpeg") for picture in pictures])

    def load(server: Running) -> Load:
        spent = server.tree.counter()
        return asyncio.run(closed_loop(server.port, following, options.clients, options.seconds, spent))

    service, empty, framework = (load(server) for server in servers)
    return compare(service, empty, framework)


def compare(ours: Load, empty: Load, framework: Load) -> dict[str, float]:
    """One closed loop against the cache, one against the empty route, and one against that within the framework."""
    cost, least = (load.server_cpu_seconds / len(load.latencies) for load in (ours, empty))
    return {
        "service_per_second": round(ours.rate, 1),
        "empty_per_second": round(empty.rate, 1),
        "framework_per_second": round(framework.rate, 1),
        "share": round(ours.rate / empty.rate, 3),
        "share_of_framework": round(ours.rate / framework.rate, 3),
        "service_core_ms": round(1000 * cost, 4),
        "empty_core_ms": round(1000 * least, 4),
        "share_by_cpu_time": round(least / cost, 3),
        "p50_ms": round(1000 * ours.percentile(0.5), 3),
        "p99_ms": round(1000 * ours.percentile(0.99), 3),
        "client_cores": round(ours.client_cores, 3),
        "client_cores_empty": round(empty.client_cores, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parse(argv)
    about = describe_run("bench_hits", argv)
    try:
        rounds, version = _measured(options)
    except (NotStarted, Refused, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    summary = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    for name, one in summary.items():
        print(
            f"{name}: {one['share']:.0%} of the empty route (aim 70 %), {one['share_by_cpu_time']:.0%} by CPU "
            f"time; {one['share_of_framework']:.0%} of the same in FastAPI"
        )
    write_result(
        options.name,
        {
            **about,
            "model": f"{options.model}, random weights",
            "clients": options.clients,
            "uvicorn": version,
            "summary": summary,
            "rounds": rounds,
        },
    )
    return 0


def _measured(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, float]]], str]:
    from importlib.metadata import version

    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), [free_port() for _ in range(3)]
        command, environment = ironclip(f"bench=random:{options.model}", ports[0], folder / "state")
        environment |= dict(pair.split("=", 1) for pair in options.set)
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(running(command, ports[0], folder / "log", environment=environment))]
            for port, app in zip(ports[1:], ("app", "framework"), strict=True):
                bare = [*_UVICORN, f"loadtests.empty:{app}", "--port", str(port), "--log-level", "warning"]
                servers.append(stack.enter_context(running(bare, port, folder / app, ready="/")))
            for number in range(1, options.rounds + 1):
                for size in options.sizes:
                    pictures = make_pictures(parse_size(size), options.pictures, options.seed)
                    for route, path in ROUTES.items():
                        fill(f"http://127.0.0.1:{ports[0]}", path, pictures)
                        found = measure(servers, path, pictures, options)
                        rounds.setdefault(f"{route} {size}", []).append(found)
                        print(f"round {number}, {route} {size}: {found}", flush=True)
    return rounds, version("uvicorn")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench_hits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, with random weights")
    parser.add_argument("--sizes", nargs="+", default=["224x224", "640x480"], help="pictures, WIDTHxHEIGHT")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=64, help="that are asked for again and again")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the service")
    parser.add_argument("--name", default="bench_hits", help="of the result file; empty to write none")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
