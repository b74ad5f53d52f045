"""`python -m loadtests.peers setup | check | run | plot`: us beside the peers, in one interleaved run.

`setup` makes an environment for each peer. `check` starts each and compares its features with open_clip's. `run`
measures, round by round and one server at a time, then the throughput of all of them in turns, and keeps each finished
part: the same command goes on where it was stopped, and `--budget-seconds` stops it before a limit. `plot` draws what
is there. A peer that cannot be installed or started is in the result with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtests.cells import Cells, OtherPlan, within
from loadtests.peers.environments import absent, set_up_all, version_of
from loadtests.peers.registry import PEERS
from loadtests.peers.report import MEANT, OURS
from loadtests.pictures import parse_size
from loadtests.report import RESULTS, describe_run

if TYPE_CHECKING:
    from loadtests.peers.measure import Bench, Options

FAULTS, TURNS, ALL = "faults", "turns", "all"
LEAST_PICTURES = 256


def keys(names: Sequence[str], dtypes: Sequence[str], rounds: int) -> list[str]:
    """Names of all cells in the order of measuring: faults, then rounds, in them dtypes, in them the peers in turn."""
    found = [f"{FAULTS}/{dtypes[0]}/{name}" for name in names if dtypes[0] in PEERS[name].dtypes]
    for number in range(1, rounds + 1):
        shift = number % len(names)
        for dtype in dtypes:
            turned = [*names[shift:], *names[:shift]]
            found += [f"{number}/{dtype}/{name}" for name in turned if dtype in PEERS[name].dtypes]
    return found + [f"{TURNS}/{dtype}/{ALL}" for dtype in dtypes]


def measure(bench: Bench, key: str, names: Sequence[str]) -> dict[str, Any]:
    """One cell; what goes wrong with a peer is its result. ``names`` are those that are asked in turns."""
    from loadtests.peers.measure import TROUBLE
    from loadtests.processes import published

    part, dtype, name = key.split("/")
    if part == TURNS:
        peers = [PEERS[one] for one in names if one == OURS or PEERS[one].rival]
        there = [peer for peer in peers if dtype in peer.dtypes and absent(peer) is None]
        return bench.turns(there, dtype)
    peer = PEERS[name]
    reason = absent(peer)
    if reason is not None:
        return {"failed": published(reason), "absent": True}
    try:
        return bench.faults(peer, dtype) if part == FAULTS else bench.speed(peer, dtype)
    except TROUBLE as error:
        print(f"{key}: {error}", file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {published(str(error))}"}


def show(key: str, cell: dict[str, Any]) -> None:
    """Print one cell in a line or a few."""
    if "failed" in cell:
        print(f"{key}: failed, {cell['failed']}", flush=True)
    elif key.startswith((FAULTS, TURNS)):
        print(f"{key}: {cell}", flush=True)
    else:
        print(
            f"{key}: ready in {cell['ready_seconds']} s, cosine {cell['least_cosine']}, {cell['idle']['mib']} MiB "
            f"idle, {cell['loaded']['mib']} loaded; again well {cell['recovery_seconds']} s after an overload"
        )
        for clients, row in cell["closed"].items():
            print(
                f"  {clients} clients: {row['images_per_second']} images/s ({row['share_of_floor']:.0%} of the floor), "
                f"p50 {row['p50_ms']}, p95 {row['p95_ms']}, p99 {row['p99_ms']} ms, {row['service_core_ms']} core-ms, "
                f"{row['refused']} refused"
            )
        for load, row in cell["open"].items():
            print(
                f"  {load}: offered {row['offered_per_second']}, goodput {row['goodput_per_second']}, p50 "
                f"{row['p50_ms']}, p99 {row['p99_ms']} ms, {row['statuses']}",
                flush=True,
            )


def planned(options: Options, **place: object) -> dict[str, Any]:
    """What cells of one table have in common: options, what the numbers mean, and machine and versions (``place``)."""
    return {**asdict(options), "size": list(options.size), "server_cpus": list(options.server_cpus), **place, **MEANT}


def run(options: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Measure the cells that are missing."""
    from loadtests.peers.measure import Bench

    chosen = _measured(options)
    present = [name for name in options.peers if absent(PEERS[name]) is None]
    about = {
        **describe_run("peers", argv),
        "versions": {name: version_of(PEERS[name]) for name in present},
    }
    plan = planned(chosen, cpu=about["machine"]["cpu"], versions=about["versions"])
    path = RESULTS / f"{options.name}.json"
    try:
        cells = Cells(path, plan, about, fresh=options.fresh)
    except OtherPlan as error:
        print(error, file=sys.stderr)
        return 1
    missing = [key for key in keys(options.peers, options.dtypes, options.rounds) if key not in cells]
    bench = Bench(chosen) if missing else None
    for key in within(missing, options.budget_seconds):
        assert bench is not None
        cell = measure(bench, key, options.peers)
        cells.put(key, cell)
        show(key, cell)
    left = sum(key not in cells.items() for key in missing)
    print(f"{left} of {len(missing)} parts are left: run the command again" if left else f"all parts are in {path}")
    return 0


def check(options: argparse.Namespace) -> int:
    """Start each peer and compare features; returns 1 where one that is there disagrees or does not start."""
    from loadtests.peers.measure import Bench

    bench, faults = Bench(_measured(options)), 0
    for name in options.peers:
        for dtype in options.dtypes:
            if dtype in PEERS[name].dtypes:
                found = _checked(bench, name, dtype)
                faults += found.startswith("failed")
                print(f"{name} {dtype}: {found}", flush=True)
    return int(faults > 0)


def _checked(bench: Bench, name: str, dtype: str) -> str:
    from loadtests.peers.measure import TROUBLE

    peer = PEERS[name]
    reason = absent(peer)
    if reason is not None:
        return f"absent, {reason}"
    try:
        with bench.started(peer, dtype) as server:
            least = bench.agreement(peer, server.port, dtype)
            return f"cosine at least {least:.6f}, ready in {server.ready_seconds:.1f} s"
    except TROUBLE as error:
        return f"failed: {error}"


def _measured(options: argparse.Namespace) -> Options:
    from loadtests.peers.measure import Options

    if options.pictures < LEAST_PICTURES:
        # Ours keeps some answers, for the pictures that come again; the fresh ones must have fallen out of it.
        raise SystemExit(f"--pictures must be at least {LEAST_PICTURES}, or some would be answered from a cache")
    return Options(
        model=options.model,
        size=parse_size(options.size),
        pictures=options.pictures,
        seed=options.seed,
        seconds=options.seconds,
        cores=options.cores,
        threads=options.threads or options.cores,
        server_cpus=tuple(options.server_cpus),
        deadlines={"float32": options.deadline_ms[0] / 1000, "bfloat16": options.deadline_ms[1] / 1000},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Do one of the commands; returns the exit status."""
    options = _parse(argv)
    if options.command == "setup":
        return set_up_all(options.peers, options.model, options.pip_args.split(), fresh=options.fresh)
    if options.command == "plot":
        from loadtests.peers.plot import draw

        return draw(RESULTS / f"{options.name}.json", options.out)
    return check(options) if options.command == "check" else run(options, argv)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="make the peers' environments")
    setup.add_argument("--pip-args", default="", help="more arguments for pip, in one string")
    setup.add_argument("--fresh", action="store_true", help="make them anew")
    measured = [commands.add_parser("check", help="start each and compare features"), commands.add_parser("run")]
    for one in [setup, *measured]:
        one.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
        one.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, with random weights")
    cores = len(os.sched_getaffinity(0))
    for one in measured:
        one.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
        one.add_argument("--size", default="224x224", help="of the pictures, WIDTHxHEIGHT")
        one.add_argument("--pictures", type=int, default=512, help="distinct pictures")
        one.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
        one.add_argument("--cores", type=int, default=cores, help="that client and server share")
        one.add_argument("--threads", type=int, default=0, help="of torch in every server; 0: as many as cores")
        one.add_argument(
            "--server-cpus", nargs="*", type=int, default=[], help="numbers of the servers' cores; all if empty"
        )
        one.add_argument(
            "--deadline-ms",
            nargs=2,
            type=float,
            default=[500.0, 250.0],
            metavar=("FLOAT32", "BFLOAT16"),
            help="of goodput",
        )
        one.add_argument("--seed", type=int, default=0)
    measured[1].add_argument("--rounds", type=int, default=3)
    measured[1].add_argument(
        "--budget-seconds", type=float, default=0.0, help="begin no part that would end later; 0: all"
    )
    measured[1].add_argument("--fresh", action="store_true", help="forget the parts that are there")
    plot = commands.add_parser("plot", help="draw the result for the README")
    plot.add_argument("--out", type=Path, default=Path("docs/loads/peers.png"))
    for one in (measured[1], plot):
        one.add_argument("--name", default="peers", help="of the result file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
