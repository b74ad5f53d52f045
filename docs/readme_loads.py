"""What README and docs/speed.md say of load and peers, from `loadtests/results` alone; what is not measured says so."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.peers.registry import PEERS
from loadtests.peers.report import FAULT_TITLES, OURS, SPEED_TITLES, Report
from loadtests.saturation import LEVELS, SUSTAINED, turns_of, verdict
from training.markdown import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "loadtests" / "results"
PLOT = "docs/loads/peers.png"
HITS_AIM = 0.7
_BUSY_CLIENT = 0.9  # cores of a client that has one: more of the empty route it could hardly ask for
GOODPUT_AIM = 0.9


def _result(name: str, folder: Path | None = None) -> dict[str, Any] | None:
    path = (folder or RESULTS) / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _made_by(found: dict[str, Any], name: str) -> str:
    machine = found["machine"]
    made = [cell.get("made", found) for cell in found.get("cells", {}).values()] or [found]
    commits = sorted({one["commit"][:12] + " with changes" * bool(one["modified"]) for one in made})
    apart = " (parts of different commits were taken at different times)" if len(commits) > 1 else ""
    return (
        f"`{found['command'].strip()}`; {machine['cpu']}, {machine['cores']} cores; "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}{apart}; [all numbers](loadtests/results/{name}.json)."
    )


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f} ms"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def peers(folder: Path | None = None) -> str:
    """Us beside the peers: speed in each dtype, faults, the aims, who is not there and why, and how it was measured."""
    found = _result("peers", folder)
    if found is None:
        return "Not measured yet: `python -m loadtests.peers setup`, then `python -m loadtests.peers run`.\n"
    report = Report(found)
    parts = []
    for dtype, deadline in report.plan["deadlines"].items():
        rows = report.speed_rows(dtype)
        if not rows:
            continue
        parts.append(f"{dtype}, deadline of goodput {1000 * deadline:.0f} ms:\n\n{table(SPEED_TITLES, rows)}")
        said = [
            f"{one.median:.2f} of {one.what} ({one.least:.2f} to {one.most:.2f} over {one.over}; aim {one.aim:g}: "
            f"{_met(one.met)})"
            for one in report.verdicts(dtype)
        ]
        if said:
            parts.append(f"In {dtype} ironclip reaches {' and '.join(said)}.\n")
    faults = report.fault_rows()
    if faults:
        parts.append(table(FAULT_TITLES, faults))
    missing = [f"{where}: {why}" for where, why in report.failures().items()]
    if missing:
        parts.append(f"Without a number: {'; '.join(missing)}.\n")
    if (ROOT / PLOT).exists() and folder is None:
        parts.append(f"![Images a second by clients, and goodput by load, for each server]({PLOT})\n")
    parts.append(_how(report, found))
    return "\n".join(parts)


def peers_line() -> str:
    """The aims beside the peers in half a sentence."""
    found = _result("peers")
    if found is None:
        return "no peer was measured yet"
    report = Report(found)
    said = [
        f"{one.median:.2f} of {one.what.partition(',')[0]} in {dtype} (aim {one.aim:g}: {_met(one.met)})"
        for dtype in report.plan["deadlines"]
        for one in report.verdicts(dtype)
    ]
    return f"the service reaches {' and '.join(said)}"


def _how(report: Report, found: dict[str, Any]) -> str:
    plan = report.plan
    rounds = len(report.rounds("float32", "ironclip") or report.rounds("bfloat16", "ironclip"))
    width, height = plan["size"]
    return (
        f"Medians of {rounds} rounds of {plan['seconds']:g} s a number, one server at a time, in turned order; "
        f"{plan['model']} with random weights, {plan['threads']} torch threads each, {plan['pictures']} distinct JPEGs "
        f"of {width}x{height}; features are open_clip's (cosine at least 0.9999 in float32, 0.999 in bfloat16). Memory "
        "is that of all processes, shared pages counted once. A client that is refused comes again when Retry-After "
        "says. Goodput is answers within the deadline of requests that come by a Poisson process; ironclip is told the "
        "deadline, the others have no header for it, and their own limits of time and of shed load stood at 60 s for "
        "all parts; callers hang up after 10 s. Well again: until one request alone meets the deadline after the "
        "overload. What a broken picture does to those beside it is also a question of how the model was written for "
        f"that server, here by us as its documentation shows it. {_made_by(found, 'peers')}\n"
    )


def peers_versions(folder: Path | None = None) -> str:
    """Which peers, and how each was set up."""
    found = _result("peers", folder)
    if found is None:
        return "Not measured yet.\n"
    notes = "; ".join(
        f"{name} {version if name != OURS else 'of the commits named there'} ({PEERS[name].note})"
        for name, version in found["versions"].items()
    )
    return f"Versions, and how each is asked: {notes}.\n"


def saturation(folder: Path | None = None) -> str:
    """Where the service saturates and what it does at twice that."""
    found = _result("saturation", folder)
    cells = [cell for cell in (found or {}).get("cells", {}).values() if "failed" not in cell]
    if found is None or not cells:
        return "Not measured yet: `python -m loadtests.saturation`.\n"
    turns = turns_of(cells)
    levels = [level for level, _, _ in LEVELS if level in turns[0]]
    answered = statistics.median(turn["1x"]["good"] / turn["1x"]["requests"] for turn in turns)
    limit = statistics.median(cell["bound_ms"] for cell in cells)
    plan = found["plan"]
    medians = "One turn" if len(turns) == 1 else f"Medians (counts: sums) of {len(turns)} turns"
    return (
        f"{table(_LEVEL_TITLES, _level_rows(turns, levels))}\n"
        f"Saturation is the highest rate of which {SUSTAINED:.0%} are answered within the deadline: "
        f"{statistics.median(cell['saturation_per_second'] for cell in cells):.1f} a second in the looks of the "
        f"search; of the level at that rate {answered:.0%} were. At twice that, goodput over the most of the other "
        "levels of its turn, and over the most of its whole round, which may have been the machine's best moment (aim "
        f"{GOODPUT_AIM:.0%}), and the p99 of what was let in over its bound of {limit:.0f} ms "
        "(`IRONCLIP_MAX_QUEUE_MS`, or a full batch where that takes longer, and a full batch's own time; aim 100%): "
        f"{'; '.join(_level_verdicts(turns, levels))}. Those who `honour` "
        "Retry-After come again when it says, up to three tries in all, and a `storm` after 0.1 s; goodput counts from "
        "the first try, for which whoever waits as long as is asked is mostly late, and beside it from the last. "
        f"{medians}, {plan['model']}, random weights. "
        f"{_made_by(found, 'saturation')}\n"
    )


_LEVEL_TITLES = [
    "load",
    "offered/s",
    "goodput/s",
    "by the last try",
    "p50",
    "p95",
    "p99",
    "p99 of the last try",
    "refused",
    "with Retry-After",
    "came again, answered",
]


def _level_rows(turns: Sequence[dict[str, Any]], levels: Sequence[str]) -> list[list[str]]:
    """A row a level; medians over the turns, and sums of counts."""
    rows = []
    for level in levels:
        each = [turn[level] for turn in turns]

        def middle(field: str, each: list[dict[str, Any]] = each) -> float:
            there = [one[field] for one in each if one[field] is not None]
            return statistics.median(there) if there else math.nan

        advised = sum(one["refused_with_retry_after"] for one in each)
        refused = sum(one["refused"] for one in each)
        limits = sorted({limit for one in each for limit in one["limits"]})
        rows.append(
            [
                level,
                f"{middle('offered_per_second'):.1f}",
                f"{middle('goodput_per_second'):.1f}",
                f"{middle('good_tries_per_second'):.1f}",
                *(_milliseconds(middle(field)) for field in ("p50_ms", "p95_ms", "p99_ms", "admitted_p99_ms")),
                f"{refused}{', by ' + ' and '.join(limits) if limits else ''}",
                f"{advised} of {refused}" if refused else "-",
                f"{sum(o['came_again_and_answered'] for o in each)} of {sum(o['came_again'] for o in each)}"
                if sum(o["came_again"] for o in each)
                else "-",
            ]
        )
    return rows


def _level_verdicts(turns: Sequence[dict[str, Any]], levels: Sequence[str]) -> list[str]:
    """What is said of each level at twice saturation."""
    said = []
    for level in [level for level in levels if level.startswith("2x")]:
        verdicts = [verdict(turn, level) for turn in turns]
        share = statistics.median(one["goodput_share"] for one in verdicts)
        bound = statistics.median(one["p99_over_bound"] for one in verdicts)
        again = level.removeprefix("2x").strip()
        tries = statistics.median(one["tries_share"] for one in verdicts)
        by_try = f"; {tries:.0%} by the last try" if again else ""
        shares = [one["goodput_share"] for one in verdicts]
        of_round = statistics.median(one["share_of_most"] for one in verdicts)
        goodput = (
            f"{share:.0%} ({min(shares):.0%} to {max(shares):.0%}; {_met(share >= GOODPUT_AIM)}; {of_round:.0%} of the "
            f"round's{by_try})"
        )
        said.append(f"{again or 'callers who go away'} {goodput} and {bound:.0%} ({_met(bound <= 1)})")
    return said


def hits(folder: Path | None = None) -> str:
    """Pictures that are in the cache, against a route that does nothing."""
    found = _result("bench_hits", folder)
    if found is None:
        return "Not measured yet: `python -m loadtests.bench_hits`.\n"
    parts = [
        f"{name}: {one['service_per_second']:.0f} of {one['empty_per_second']:.0f} a second, "
        f"{'at most ' * (one['client_cores_empty'] > _BUSY_CLIENT)}{one['share']:.0%} "
        f"({_met(one['share'] >= HITS_AIM)}; by CPU time {one['share_by_cpu_time']:.0%}; "
        f"{one['share_of_framework']:.0%} of FastAPI's {one['framework_per_second']:.0f})"
        for name, one in found["summary"].items()
    ]
    return (
        "Pictures that were seen before, against an empty route on the same server that receives and hashes the same "
        f"body, in bare ASGI (aim {HITS_AIM:.0%}); and against the same as a route of FastAPI, which the service is "
        f"written in: {'; '.join(parts)}. {_made_by(found, 'bench_hits')}\n"
    )


def starts(folder: Path | None = None) -> str:
    """Start to ready, memory and disk, beside the peers."""
    found = _result("bench_start", folder)
    if found is None:
        return "Not measured yet: `python -m loadtests.bench_start`.\n"
    rows, installed = [], found.get("installed_mib", {})
    for name, one in found["summary"].items():
        if "failed" in one:
            rows.append([name, one["failed"], "-", "-", "-", "-"])
            continue
        numbers = [f"{one['ready_seconds']:.1f} s", *(f"{one[key]:.0f} MiB" for key in ("idle_mib", "loaded_mib"))]
        disk = installed.get(name)
        rows.append([name, *numbers, f"{one['processes']:.0f}", "-" if disk is None else f"{disk:.0f} MiB"])
    titles = ["server", "start to first answer", "idle", "after load", "processes", "on disk, beside Python and torch"]
    said = (
        f"{found['dtype']}; memory is that of all processes, shared pages counted once. On disk: what an image has of "
        "it beside Python, torch and what torch needs, which are the same for all; without compiled files, for ours "
        "without OpenTelemetry and with the demo encoders."
    )
    aims = _start_aims(found.get("rounds", ()), installed)
    return f"{table(titles, rows)}\n{said} {aims}{_made_by(found, 'bench_start')}\n"


def _start_aims(rounds: Sequence[dict[str, Any]], installed: Mapping[str, float]) -> str:
    """Start, memory and disk against the best peer, of the same round; fastapi is none: it is the least of a server."""
    parts = []
    for what, key in (("start", "ready_seconds"), ("memory after load", "loaded_mib")):
        shares, names = [], set()
        for one in rounds:
            rivals = [
                (found[key], name)
                for name, found in one.items()
                if name in PEERS and PEERS[name].rival and key in found
            ]
            if rivals and key in one.get("ironclip", {}):
                best, name = min(rivals)
                names.add(name)
                shares.append(one["ironclip"][key] / best)
        if shares:
            share = statistics.median(shares)
            span = f"{min(shares):.2f} to {max(shares):.2f} over rounds"
            parts.append(
                f"{what} {share:.2f} of the best peer's ({', '.join(sorted(names))}; {span}; {_met(share <= 1)})"
            )
    rivals = {name: size for name, size in installed.items() if PEERS[name].rival}
    if rivals and OURS in installed:
        least = min(rivals, key=lambda name: rivals[name])
        share = installed[OURS] / rivals[least]
        parts.append(f"on disk {share:.2f} times the least ({least}; {_met(share <= 1)})")
    return f"Aims, less than the peers': {'; '.join(parts)}. " if parts else ""


def lines() -> str:
    """What `hits`, `starts` and `saturation` come to, a line each."""
    said = []
    found = _result("bench_hits")
    if found is not None:
        one = list(found["summary"].values())
        said.append(
            f"From the cache: {_span(one, 'share')} of what an empty route on the same server answers in bare ASGI "
            f"(aim {HITS_AIM:.0%}: {_met(min(each['share'] for each in one) >= HITS_AIM)}), "
            f"{_span(one, 'share_of_framework')} of the same as a route of FastAPI."
        )
    found = _result("bench_start")
    if found is not None and (aims := _start_aims(found.get("rounds", ()), found.get("installed_mib", {}))):
        said.append(aims.strip())
    found = _result("saturation")
    cells = [cell for cell in (found or {}).get("cells", {}).values() if "failed" not in cell]
    if cells:
        turns = turns_of(cells)
        levels = [level for level, _, _ in LEVELS if level in turns[0]]
        said.append(
            "At twice what saturates it, goodput over the most of the other levels, and the p99 of what was let in "
            f"over its bound (aims {GOODPUT_AIM:.0%} and 100%): {'; '.join(_level_verdicts(turns, levels))}. Those who "
            "`honour` Retry-After come again when it says, a `storm` after 0.1 s."
        )
    return "".join(f"- {line}\n" for line in said)


def _span(found: Sequence[Mapping[str, float]], key: str) -> str:
    values = [each[key] for each in found]
    return f"{100 * min(values):.0f} to {max(values):.0%}"
