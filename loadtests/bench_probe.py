"""What running probes do to classifications: `python -m loadtests.bench_probe`.

Starts a service of its own and measures, in turns, several rounds: latency of `/classify` with distinct pictures in a
closed loop, alone and with probes running all the time. The aim: the p99 under probes is at most the p99 alone plus one
quantum, the longest piece of a probe's work that may go before a classification. Writes JSON to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from loadtests.bench_floor import service
from loadtests.client import Load, closed_loop, cycle, post
from loadtests.machine import process_seconds
from loadtests.pictures import make_pictures
from loadtests.report import describe_run, write_result

LABELS = [f"label {i}" for i in range(20)]
# Never broken, so that the probes go on until they are cancelled: a cosine is never below -1.
ENDLESS = {"objective": "embedding", "cosine_below": -1, "effort": "thorough", "seconds": 600, "gradients": 10_000_000}


@contextlib.asynccontextmanager
async def probes_running(url: str, count: int, pictures: Sequence[bytes]) -> AsyncIterator[list[float]]:
    """Keep probes running meanwhile; afterwards the list holds their gradients a second."""
    rates: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        started = []
        for data in pictures[:count]:
            body = {"image": base64.b64encode(data).decode(), **ENDLESS}
            answer = await client.post("/attack-probe", json=body, headers={"Prefer": "respond-async"})
            answer.raise_for_status()
            started.append(answer.json()["id"])
        while (await client.get(f"/probes/{started[-1]}")).json()["status"] != "running":
            await asyncio.sleep(0.05)
        try:
            yield rates
        finally:
            for identity in started:
                known = (await client.get(f"/probes/{identity}")).json().get("progress", {})
                rates.append(known.get("gradients", 0) / max(known.get("elapsed", 0), 1e-9))
                await client.delete(f"/probes/{identity}")
            while (await client.get(f"/probes/{started[-1]}")).json()["status"] == "running":
                await asyncio.sleep(0.05)


async def measure(port: int, pid: int, requests: list[bytes], pictures: list[bytes], options: Any) -> dict[str, Any]:
    """One round: alone, then with probes, at each concurrency."""
    found: dict[str, Any] = {}
    following, spent = cycle(requests), functools.partial(process_seconds, pid)
    for concurrency in options.concurrency:
        alone = await closed_loop(port, following, concurrency, options.seconds, spent)
        async with probes_running(f"http://127.0.0.1:{port}", options.probes, pictures) as rates:
            beside = await closed_loop(port, following, concurrency, options.seconds, spent)
        found[str(concurrency)] = {
            "alone": _latency(alone),
            "probed": {**_latency(beside), "gradients_per_second": round(sum(rates), 1)},
        }
    return found


def _latency(load: Load) -> dict[str, float]:
    percentiles = {f"p{round(100 * share)}_ms": round(1000 * load.percentile(share), 2) for share in (0.5, 0.95, 0.99)}
    return {"per_second": round(load.rate, 1), "replies": len(load.latencies), **percentiles}


def summarise(rounds: Sequence[dict[str, Any]], quantum_ms: float) -> dict[str, Any]:
    """Medians over rounds, and how many quanta the p99 has grown by."""
    result: dict[str, Any] = {}
    for concurrency in rounds[0]:
        alone, probed = (
            {
                name: statistics.median(one[concurrency][kind][name] for one in rounds)
                for name in rounds[0][concurrency][kind]
            }
            for kind in ("alone", "probed")
        )
        grown = (probed["p99_ms"] - alone["p99_ms"]) / quantum_ms
        result[concurrency] = {"alone": alone, "probed": probed, "p99_grown_by_quanta": round(grown, 2)}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_probe", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, with random weights")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--probes", type=int, default=4, help="running at the same time")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--cores", type=int, default=cores)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the service")
    parser.add_argument("--name", default="bench_probe", help="of the result file; empty to write none")
    options = parser.parse_args(argv)
    about = describe_run("bench_probe", argv)
    options.set = ["IRONCLIP_PROBE_MAX_SECONDS=600", "IRONCLIP_PROBE_MAX_GRADIENTS=1000000000", *options.set]
    pictures = make_pictures((224, 224), options.pictures, options.seed)
    requests = [
        post(
            "/classify",
            json.dumps({"image": base64.b64encode(one).decode(), "labels": LABELS}).encode(),
            "application/json",
        )
        for one in pictures
    ]
    with service(options.model, options) as (port, pid):
        model = httpx.get(f"http://127.0.0.1:{port}/models/default").json()
        rounds = []
        for number in range(1, options.rounds + 1):
            rounds.append(asyncio.run(measure(port, pid, requests, pictures, options)))
            print(f"round {number}: {json.dumps(rounds[-1])}", flush=True)
    summary = summarise(rounds, model["probe"]["quantum_ms"])
    for concurrency, one in summary.items():
        print(
            f"{concurrency} clients: p99 alone {one['alone']['p99_ms']:.0f} ms, with {options.probes} probes "
            f"{one['probed']['p99_ms']:.0f} ms: {one['p99_grown_by_quanta']:+.2f} quanta of "
            f"{model['probe']['quantum_ms']:.0f} ms (aim at most +1)"
        )
    write_result(
        options.name,
        {
            **about,
            "model": f"{options.model}, random weights",
            "dtype": model["dtype_report"]["chosen"],
            "probe": model["probe"],
            "probes": options.probes,
            "summary": summary,
            "rounds": rounds,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
