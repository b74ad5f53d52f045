"""How soon a server is ready, what memory and disk it takes, ours and the peers': `python -m loadtests.bench_start`.

Each is started in turns, several rounds: seconds until its first answer, memory then and after a load of eight clients.
All run in environments of their own (`python -m loadtests.peers setup`), with what each asks for and no more: what that
adds to Python and torch, which are the same for all, is what an image of it has beside them.
Ours is there twice: as it is by default, and without probes, which the peers do not have either and which keep a copy
of the weights in float32 where something else is served. Writes JSON to loadtests/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.client import Refused, ask, closed_loop, cycle
from loadtests.peers.environments import absent, installed_mib, version_of
from loadtests.peers.registry import PEERS, Start
from loadtests.pictures import make_pictures
from loadtests.processes import NotStarted, free_port, published, running
from loadtests.report import describe_run, write_result

_CLIENTS = 8


def variants(names: Sequence[str], dtype: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Rows of the table: the peer that is started, and settings of ours."""
    found: dict[str, tuple[str, dict[str, object]]] = {}
    for name in names:
        if dtype in PEERS[name].dtypes:
            found[name] = (name, {})
            if name == "ironclip":
                found["ironclip, no probes"] = (name, {"probes": False})
    return found


def measure(
    name: str, settings: dict[str, object], pictures: list[bytes], options: argparse.Namespace
) -> dict[str, Any]:
    """Start one server, load it, stop it."""
    peer = PEERS[name]
    reason = absent(peer)
    if reason is not None:
        return {"failed": published(reason)}
    following = cycle([peer.request(picture) for picture in pictures])
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            start = Start(
                peer.python, free_port(), options.model, options.dtype, options.threads, place, settings=settings
            )
            environment, began = peer.environment(start), time.monotonic()
            with running(
                peer.command(start), start.port, place / "log", ready=peer.ready, environment=environment
            ) as server:
                # Some say that they are ready before they are: the first answer counts.
                first = asyncio.run(ask(start.port, following()))
                if first.status != 200:
                    raise Refused(f"its first answer had the status {first.status}")
                ready = time.monotonic() - began
                idle = server.tree.memory()
                asyncio.run(closed_loop(start.port, following, _CLIENTS, options.seconds, server.tree.counter()))
                loaded = server.tree.memory()
                return {
                    "ready_seconds": round(ready, 2),
                    "idle_mib": round(idle.once),
                    "idle_pss_mib": round(idle.pss),
                    "loaded_mib": round(loaded.once),
                    "loaded_pss_mib": round(loaded.pss),
                    "processes": len(server.tree.alive()),
                }
    except (NotStarted, Refused, OSError, EOFError) as error:
        return {"failed": published(str(error))}


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds in which a server was measured; why, where it never was."""
    summary: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        found = [one[name] for one in rounds if "failed" not in one[name]]
        summary[name] = (
            {key: statistics.median(one[key] for one in found) for key in found[0]} if found else rounds[0][name]
        )
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parse(argv)
    about = describe_run("bench_start", argv)
    pictures = make_pictures((224, 224), 64, options.seed)
    rows = variants(options.peers, options.dtype)
    there = [name for name in options.peers if absent(PEERS[name]) is None]
    disk = {name: round(mib, 1) for name in there if (mib := installed_mib(PEERS[name])) is not None}
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(1, options.rounds + 1):
        found = {}
        for row, (name, settings) in rows.items():
            found[row] = measure(name, settings, pictures, options)
            print(f"round {number}, {row}: {found[row]}", flush=True)
        rounds.append(found)
    write_result(
        options.name,
        {
            **about,
            "model": f"{options.model}, random weights",
            "dtype": options.dtype,
            "versions": {name: version_of(PEERS[name]) for name in there},
            "installed_mib": disk,
            "summary": summarise(rounds),
            "rounds": rounds,
        },
    )
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, with random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch in every server")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="bench_start", help="of the result file; empty to write none")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
