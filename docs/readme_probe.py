"""What README and docs say of the cost of COLA and of probes, made from the benchmarks' results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cola import aim_of

ROOT = Path(__file__).parent.parent


def _result(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return found


def _verdict(value: float, aim: float) -> str:
    return "met" if value <= aim else "missed"


def cola_cost() -> str:
    """COLA's work beside the forwards."""
    path = "benchmarks/results/cola.json"
    found = _result(path)
    parts = []
    for one in found["batches"]:
        said = [f"{100 * share:.1f} % of them in {dtype}" for dtype, share in one["beyond_forwards"].items()]
        if one is found["batches"][0]:
            judged = [
                f"{100 * aim:.0f} %, {_verdict(share, aim)}"
                for dtype, share in one["beyond_forwards"].items()
                for aim in [aim_of(dtype, found["device"])]
            ]
            said = [f"{words} (aim {aim})" for words, aim in zip(said, judged, strict=True)]
        parts.append(f"at batch {one['batch']} {' and '.join(said)}")
    ours, pot = (found["batches"][0]["ms_per_picture"][name] for name in ("transport ours", "transport POT"))
    return (
        f"Beside its forwards, COLA makes {found['views']} views and decides, here among {found['labels']:,} labels of "
        f"{found['texts']} texts, which takes {'; '.join(parts)} ({found['model']}, {found['device']}, "
        f"{found['threads']} threads). Sinkhorn is ours: {ours:.1f} ms a picture where POT's "
        f"`solve_batch` takes {pot:.1f}; POT is the oracle in the tests and the exact coupling. "
        f"`python -m benchmarks.cola`, commit {found['commit'][:12]}; [all numbers]({path})."
    )


def probe_cost() -> str:
    """What probes do to classifications, and how quick they are."""
    path = "loadtests/results/bench_probe.json"
    found = _result(path)
    parts = []
    for clients, one in found["summary"].items():
        grown = one["p99_grown_by_quanta"]
        parts.append(
            f"with {clients} client{'s' * (clients != '1')} {one['alone']['p99_ms']:.0f} ms alone and "
            f"{one['probed']['p99_ms']:.0f} ms beside {found['probes']} probes, {grown:+.2f} quanta "
            f"({_verdict(grown, 1)}) at {one['probed']['per_second']:g} instead of {one['alone']['per_second']:g} "
            "pictures a second"
        )
    return (
        f"The p99 of `/classify` is to grow by one quantum ({found['probe']['quantum_ms']:.0f} ms here) at most: "
        f"{'; '.join(parts)}. `{found['command']}`, {found['model']}, {found['dtype']}, {found['machine']['cores']} "
        f"cores, commit {found['commit'][:12]}; [all numbers]({path})."
    )


def probe_line() -> str:
    """What `probe_cost` and `probe_peers` come to."""
    cost, against = _result("loadtests/results/bench_probe.json"), _result("benchmarks/results/probe.json")
    grown = [one["p99_grown_by_quanta"] for one in cost["summary"].values()]
    shares = [one["time_share"] for one in against["encoders"]]
    found = "; ".join(
        f"on `{one['encoder']}` {one['mean_radius']:.2f}/255 where that finds {one['their_mean_radius']:.2f}/255"
        for one in against["encoders"]
    )
    return (
        f"Beside {cost['probes']} probes the p99 of `/classify` grows by {max(grown):.2f} quanta of "
        f"{cost['probe']['quantum_ms']:.0f} ms at most here (aim 1: {_verdict(max(grown), 1)}). Smallest radii are "
        f"found in {100 * min(shares):.0f} to {100 * max(shares):.0f} % of torchattacks' time: {found}."
    )


def probe_peers() -> str:
    """The smallest radius against torchattacks."""
    path = "benchmarks/results/probe.json"
    found = _result(path)
    parts = [
        f"on `{one['encoder']}` {one['mean_radius']:.2f}/255 on average where theirs finds "
        f"{one['their_mean_radius']:.2f}/255, in {100 * one['time_share']:.0f} % of its time"
        for one in found["encoders"]
    ]
    samples = len(found["encoders"][0]["rows"])
    return (
        f"The smallest radius that breaks each of the {samples} samples, by {found['attack']} "
        f"and on one picture at a time, against torchattacks {found['torchattacks']} by bisection: {'; '.join(parts)}. "
        f"`python -m benchmarks.probe`, {found['device']}, {found['threads']} threads, commit {found['commit'][:12]}; "
        f"[all numbers]({path})."
    )
