"""`python -m service selfcheck`: does the service work as it should on this machine, and how fast is it?

Everything is asked of a `ServedEncoder` as the service makes it: the dtype and the forward that it chose, its batcher
and its tower. Each check is PASS or FAIL with what to do; measurements stand beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ironclip.errors import IronclipError
from service.environment import let_idle_threads_sleep
from service.heap import share_heaps
from service.probe_places import Places
from service.settings import Settings, SettingsInvalid, load_settings

if TYPE_CHECKING:
    from service.checks import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--encoder", default="", metavar="SPEC", help="an encoder spec (default: the service's own)")
    parser.add_argument("--device", help="over IRONCLIP_DEVICE: auto, cpu, cuda or cuda:N", default=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=6.0, help="for measuring the throughput (default 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found into this file too")


def run(arguments: argparse.Namespace) -> int:
    """Check this machine, print what was found; returns 0 if all checks passed, 1 if not, 2 for bad settings."""
    overrides = {"device": arguments.device} if hasattr(arguments, "device") else {}
    let_idle_threads_sleep()
    share_heaps()
    try:
        settings = load_settings(**overrides)
    except SettingsInvalid as error:
        print(f"The settings cannot be used:\n  {error.detail.replace(chr(10), chr(10) + '  ')}", file=sys.stderr)
        return 2
    spec = arguments.encoder or settings.encoders[settings.default_name]
    try:
        report = checked(spec, settings, arguments.seconds)
    except IronclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(in_words(report))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: {arguments.json} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0 if report.passed else 1


def checked(spec: str, settings: Settings, seconds: float) -> Report:
    """Load the encoder as the service would, and go through all checks.

    Raises:
        IronclipError: it cannot be loaded, or the device does not exist.
    """
    _say("loading torch")
    from ironclip.loading import load_encoder
    from service.checks import Report, check_all
    from service.machine import describe_machine, memory_mib
    from service.runtime import ServedEncoder, use_threads

    threads = use_threads(settings.threads)
    _say(f"loading {spec}")
    plain = load_encoder(spec, device=settings.device)
    _say("choosing dtype and forward, warming batch sizes")
    began = time.perf_counter()
    served = ServedEncoder(
        "selfcheck",
        plain,
        dtype=settings.dtype,
        forward=settings.compile,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        idle_wait_ms=settings.idle_wait_ms,
        places=Places(settings.max_probes) if settings.probes else None,
        quantum_ms=settings.probe_quantum_ms,
        images_expected=lambda: False,
    )
    served.start()
    report = Report()
    report.measured = {
        "machine": {**describe_machine(plain.device), "threads": threads},
        "encoder": {"spec": spec, "digest": served.digest, "resolution": plain.resolution, "dim": plain.dim},
        "max_batch": settings.max_batch,
        "dtype": served.dtype_report.to_json(),
        "forward": served.forward_report.to_json(),
        "probe": served.probe_report,
        "seconds_to_start": round(time.perf_counter() - began, 2),
    }
    try:
        asyncio.run(check_all(report, served, seconds, _say))
    finally:
        report.measured["memory_mib"] = memory_mib(plain.device)
    _say("")
    return report


def in_words(report: Report) -> str:
    """The report for a terminal."""
    found = report.measured
    machine, dtype, forward = found["machine"], found["dtype"], found["forward"]
    lines = [f"{name:12} {value}" for name, value in machine.items() if value not in ("", None)]
    lines.append(f"{'encoder':12} {found['encoder']['spec']}, {found['encoder']['resolution']} px")
    for trial in dtype["trials"]:
        speeds = ", ".join(f"{speed:g} images/s in {size}s" for size, speed in trial["images_per_second"].items())
        verdict = trial["rejected"] or ("chosen" if trial["dtype"] == dtype["chosen"] else "slower")
        drift = "" if trial["min_cosine"] is None else f"least cosine {trial['min_cosine']}"
        measured = "; ".join(filter(None, (speeds, drift)))
        lines.append(f"{trial['dtype']:12} {measured}{': ' if measured else ''}{verdict}")
    for size, times in forward["milliseconds"].items():
        lines.append(f"{'forward':12} batch of {size}: plain {times['plain']:g} ms, tried {times['tried']:g} ms")
    for size, times in found["batches"].items():
        lines.append(f"batch {size:>6} {times['milliseconds']:g} ms, {times['images_per_second']:g} images/s")
    if found["probe"]:
        probe = found["probe"]
        lines.append(
            f"{'probes':12} {probe['rows']:g} rows, {probe['views']:g} views; {probe['piece_ms']:g} ms a piece"
        )
    memory = ", ".join(f"{name} {value} MiB" for name, value in found["memory_mib"].items())
    lines += [f"{'memory':12} {memory}", ""]
    for check in report.checks:
        lines.append(f"{'PASS' if check.passed else 'FAIL'} {check.name}: {check.found}")
        if not check.passed:
            lines.append(f"     {check.advice}")
    failed = sum(not check.passed for check in report.checks)
    lines.append("")
    lines.append(f"{len(report.checks) - failed} of {len(report.checks)} checks passed.")
    return "\n".join(lines)


def _say(text: str) -> None:
    """Progress, on standard error; on a terminal one line that changes."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(f"selfcheck: {text}", file=sys.stderr, flush=True)
