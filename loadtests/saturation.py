"""Where the service saturates, and what it does at twice that: `python -m loadtests.saturation`.

Each round finds the highest rate of Poisson arrivals of which 95 % are answered within the deadline, by bisection, and
then runs, in turns, half of it, all of it, a quarter more and twice it, the last also with callers who come again: when
Retry-After says, and at once. Goodput is held against the most of the turn's other levels, since machines drift, and
against the most of the whole round, which may have been the machine's best moment. The deadline is the bound of what is
let in: `IRONCLIP_MAX_QUEUE_MS`, or a full batch where that takes longer, and the request's own time; both of the latter
are what a closed loop of one full batch sees. Rounds are kept as they end; the same command goes on where it was
stopped. The aims: at twice saturation the goodput is at least 90 % of its peak, and the p99 of what is let in is within
the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests import open_loop
from loadtests.cells import Cells, OtherPlan, within
from loadtests.client import closed_loop, cycle, post
from loadtests.open_loop import Manner, Plan
from loadtests.pictures import make_pictures, parse_size
from loadtests.processes import NotStarted, Running, free_port, ironclip, running
from loadtests.report import RESULTS, describe_run

SUSTAINED = 0.95
_BRACKETING = 8
_CACHE_BYTES = 100_000  # see bench_floor: no picture is answered from it
# Options that a result is made by; rounds made by others are not mixed.
_PLAN = (
    *("model", "dtype", "size", "pictures", "max_queue_ms", "batch", "deadline_ms", "send_deadline"),
    *("seconds", "search_seconds", "steps", "turns", "seed", "set"),
)
LEVELS: tuple[tuple[str, float, Manner], ...] = (
    ("0.5x", 0.5, "leave"),
    ("1x", 1.0, "leave"),
    ("1.25x", 1.25, "leave"),
    ("2x", 2.0, "leave"),
    ("2x honour", 2.0, "honour"),
    ("2x storm", 2.0, "storm"),
)


def longest_round(options: argparse.Namespace) -> float:
    """Seconds of one round at most, without the service's start and what the last callers of a level wait for."""
    looks = 1 + _BRACKETING + options.steps
    seconds: float = looks * options.search_seconds + options.turns * len(LEVELS) * options.seconds
    return seconds


def find_saturation(sustained: Callable[[float], bool], start: float, steps: int) -> tuple[float, int]:
    """The highest sustained rate: doubled or halved from `start` until it is bracketed, then bisected.

    Returns:
        The rate, 0 where none of those tried is sustained, and how many rates were tried.
    """
    low, high, tried = 0.0, 0.0, 0
    rate = start
    while not (low and high) and tried < _BRACKETING:
        tried += 1
        if sustained(rate):
            low, rate = rate, rate * 2
        else:
            high, rate = rate, rate / 2
    for _ in range(steps if low and high else 0):
        tried += 1
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sustained(middle) else (low, middle)
    return low, tried


def measure_round(server: Running, requests: list[bytes], number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One round: own time, saturation, then each level."""
    # The search begins with the first half. Here all wait, however long: no deadline is sent.
    following = cycle(_requests(options, deadline=False)[len(requests) // 2 :])
    loop = closed_loop(server.port, following, options.batch, options.search_seconds, lambda: 0.0, patient=True)
    loaded = asyncio.run(loop)
    own = loaded.percentile(0.95)
    # As the service has it: no less than one full batch may be ahead, or batches would not fill on a slow machine.
    bound = max(options.max_queue_ms / 1000, own) + own
    deadline = options.deadline_ms / 1000 if options.deadline_ms else bound
    trials: list[dict[str, Any]] = []

    def offer(rate: float, seconds: float, manner: Manner = "leave") -> dict[str, Any]:
        seed = options.seed + 1000 * number + len(trials)
        first = sum(trial["sent"] for trial in trials)
        plan = Plan(server.port, requests, rate, seconds, seed, 4 * bound + 10, manner, first)
        outcomes = open_loop.run(plan)
        found = open_loop.summarise(outcomes, plan, deadline, warm=seconds / 5)
        trials.append({"rate": round(rate, 3), "manner": manner, "sent": len(outcomes), **found})
        return found

    def sustained(rate: float) -> bool:
        found = offer(rate, options.search_seconds)
        return bool(found["good"] >= SUSTAINED * found["requests"])

    saturation, _ = find_saturation(sustained, loaded.rate, options.steps)
    if not saturation:
        return {"failed": "no rate was sustained", "trials": trials}
    searched = len(trials)
    turns = [
        {name: offer(share * saturation, options.seconds, manner) for name, share, manner in LEVELS}
        for _ in range(options.turns)
    ]
    return {
        "own_ms": round(1000 * own, 1),
        "bound_ms": round(1000 * bound, 1),
        "deadline_ms": round(1000 * deadline, 1),
        "closed_loop_per_second": round(loaded.rate, 2),
        "saturation_per_second": round(saturation, 2),
        "turns": turns,
        "search": trials[:searched],
    }


def turns_of(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The turns of all rounds, each with the bound of its round as `bound_ms` and its most goodput as `most`."""
    found = []
    for cell in cells:
        left = [level for turn in cell["turns"] for level in _unrepeated(turn)]
        most = max(level["goodput_per_second"] for level in [*cell["search"], *left])
        found += [{**turn, "bound_ms": cell["bound_ms"], "most": most} for turn in cell["turns"]]
    return found


def _unrepeated(turn: Mapping[str, Any], but: str = "") -> list[dict[str, Any]]:
    """The levels of callers who go away when they are refused."""
    return [turn[name] for name, _, manner in LEVELS if manner == "leave" and name in turn and name != but]


def verdict(turn: Mapping[str, Any], level: str = "2x") -> dict[str, float]:
    """One turn against the aims: goodput at twice saturation over its peak, and the admitted p99 over the bound.

    The peak is that of the turn's other levels, so that a share may be above 1; `share_of_most` is over that of all of
    the round. `tries_share` counts from the try that was let in.

    Args:
        turn: from `turns_of`.
        level: callers who go away when they are refused (2x), or who come again (2x honour, 2x storm).
    """
    twice = turn[level]
    peak = max(other["goodput_per_second"] for other in _unrepeated(turn, but=level))
    p99 = twice["admitted_p99_ms"]
    return {
        "goodput_share": _share(twice["goodput_per_second"], peak),
        "share_of_most": _share(twice["goodput_per_second"], turn["most"]),
        "tries_share": _share(twice["good_tries_per_second"], peak),
        "p99_over_bound": round(p99 / turn["bound_ms"], 3) if p99 is not None else float("inf"),
    }


def _share(goodput: float, peak: float) -> float:
    return round(goodput / peak, 3) if peak else 0.0


def show(name: str, cell: dict[str, Any]) -> None:
    """Print one round in a few lines."""
    if "failed" in cell:
        print(f"{name}: failed, {cell['failed']}", flush=True)
        return
    print(f"{name}: saturated at {cell['saturation_per_second']} a second (deadline {cell['deadline_ms']} ms)")
    for number, turn in enumerate(turns_of([cell]), 1):
        for level, _, _ in LEVELS:
            found = turn[level]
            print(
                f"  turn {number}, {level}: offered {found['offered_per_second']}, goodput "
                f"{found['goodput_per_second']}; p50 {found['p50_ms']}, p95 {found['p95_ms']}, p99 {found['p99_ms']}, "
                f"of the last try {found['admitted_p99_ms']} ms; {found['statuses']}, limits {found['limits']}, "
                f"Retry-After on {found['refused_with_retry_after']} of {found['refused']}, came again "
                f"{found['came_again']}, answered then {found['came_again_and_answered']}"
            )
        found = verdict(turn)
        print(
            f"  at twice saturation {found['goodput_share']:.0%} of the turn's peak (aim 90 %), "
            f"{found['share_of_most']:.0%} of the round's, admitted p99 "
            f"{found['p99_over_bound']:.0%} of the bound {cell['bound_ms']} ms (aim 100 %)",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds that are missing; returns the exit status."""
    options = _parse(argv)
    settings = {
        "max_queue_ms": options.max_queue_ms,
        "max_batch": options.batch,
        "cache_bytes": _CACHE_BYTES,
        **({"dtype": options.dtype} if options.dtype else {}),
    }
    plan = {name: getattr(options, name) for name in _PLAN} | {"levels": [name for name, _, _ in LEVELS]}
    about = describe_run("saturation", argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = RESULTS / f"{options.name}.json" if options.name else Path(folder) / "result.json"
            cells = Cells(path, plan, about, fresh=options.fresh)
            missing = [f"round {number}" for number in range(1, options.rounds + 1) if f"round {number}" not in cells]
            minutes = longest_round(options) / 60
            print(f"{len(missing)} rounds to run, of {minutes:.1f} minutes each at most, beside the starts", flush=True)
            for name in within(missing, options.budget_seconds):
                port = free_port()
                command, environment = ironclip(
                    f"bench=random:{options.model}", port, Path(folder) / "state", **settings
                )
                environment |= dict(pair.split("=", 1) for pair in options.set)
                with running(command, port, Path(folder) / "log", environment=environment) as server:
                    cells.put(name, measure_round(server, _requests(options), int(name.split()[1]), options))
                show(name, cells.items()[name])
            left = sum(name not in cells for name in missing)
    except (OtherPlan, NotStarted, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{left} rounds are left: run the command again" if left else "all rounds are there")
    return 0


def _requests(options: argparse.Namespace, deadline: bool = True) -> list[bytes]:
    sent = deadline and options.send_deadline
    headers = {"X-Request-Timeout-Ms": str(round(options.deadline_ms))} if sent else {}
    pictures = make_pictures(parse_size(options.size), options.pictures, options.seed)
    return [post("/embed?encoding_format=base64", picture, "image/jpeg", headers) for picture in pictures]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.saturation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip architecture, with random weights")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; what the service chooses if not given")
    parser.add_argument("--size", default="224x224", help="of the pictures, WIDTHxHEIGHT")
    parser.add_argument("--pictures", type=int, default=512, help="distinct pictures")
    parser.add_argument("--max-queue-ms", type=float, default=2000.0, help="IRONCLIP_MAX_QUEUE_MS of the service")
    parser.add_argument("--batch", type=int, default=32, help="IRONCLIP_MAX_BATCH of the service")
    parser.add_argument("--deadline-ms", type=float, default=0.0, help="of goodput; 0: the bound of what is let in")
    parser.add_argument("--send-deadline", action="store_true", help="send it as X-Request-Timeout-Ms, too")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each level; the first fifth is not counted")
    parser.add_argument("--search-seconds", type=float, default=20.0, help="of each rate of the search")
    parser.add_argument("--steps", type=int, default=4, help="bisections of the search")
    parser.add_argument("--turns", type=int, default=2, help="of the levels in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-seconds", type=float, default=0.0, help="begin no round that would end later; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the service")
    parser.add_argument("--fresh", action="store_true", help="forget rounds that are there")
    parser.add_argument("--name", default="saturation", help="of the result file; empty to write none")
    options = parser.parse_args(argv)
    if options.send_deadline and not options.deadline_ms:
        parser.error("--send-deadline needs --deadline-ms")
    return options


if __name__ == "__main__":
    sys.exit(main())
