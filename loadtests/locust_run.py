"""Locust without its page: `python -m loadtests.locust_run --users 50 --seconds 60 --scenario mix --url URL`.

Writes a JSON summary and locust's HTML report, and prints the summary in a few lines. It ends with status 1 where
anything but a refusal (429, 503) failed. Options after `--` go to locust as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from loadtests.outcomes import KINDS
from loadtests.processes import ROOT

_REFUSALS = ("429", "503")


def command_of(options: argparse.Namespace) -> list[str]:
    """Locust's command line for these options."""
    load = ["--users", str(options.users), "--spawn-rate", str(options.spawn_rate or options.users)]
    what = ["--scenario", options.scenario, "--pictures", str(options.pictures), "--size", options.size]
    told = ["--summary", str(options.summary), "--html", str(options.report), "--seed", str(options.seed)]
    return [
        *(sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"),
        *("--host", options.url, "--run-time", f"{options.seconds}s", "--exit-code-on-error", "0"),
        *load,
        *what,
        *told,
        *(["--allow-remote"] if options.allow_remote else []),
        *options.more,
    ]


def trouble(url: str) -> str | None:
    """Why there would be nothing to see: nobody listens, or the key is none; None where all is well."""
    key = os.environ.get("IRONCLIP_API_KEY", "")
    try:
        answer = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30)
    except httpx.HTTPError as error:
        return f"nothing answers at {url} ({type(error).__name__}): start the service, or give its --url"
    if answer.status_code in (401, 403):
        what = "IRONCLIP_API_KEY was refused" if key else "the service wants an API key: set IRONCLIP_API_KEY"
        return f"{what} ({answer.status_code}; the scope infer is needed)"
    return None


def show(summary: dict[str, Any]) -> int:
    """Print a summary; returns how many requests failed otherwise than by being refused."""
    rows = {**summary["requests"], "all": summary["total"]}
    for name, row in rows.items():
        answered = row["requests"] - row["failures"]
        print(f"{name}: {row['requests']} requests, {answered} of them answered, {row['per_second']} a second")
        for kind in KINDS:
            if kind in row:
                print(f"  {kind}: {row[kind]['requests']}, {_pace(row[kind])}")
    faults = 0
    for failure in summary["failures"]:
        faults += failure["times"] * (not failure["reason"].startswith(_REFUSALS))
        print(f"  {failure['name']}: {failure['times']} times {failure['reason']}")
    if summary["fresh_pictures"]["came_again"]:
        pictures = summary["fresh_pictures"]
        print(f"{pictures['asked']} fresh pictures were asked for and {pictures['made']} made: raise --pictures")
    return faults


def _pace(row: dict[str, Any]) -> str:
    times = ", ".join(f"p{share} {row[f'p{share}_ms']:.0f}" for share in (50, 95, 99))
    return f"{row['per_second']} a second, {times} ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Run locust and show what it found; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = _parse(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    options.more = more
    if importlib.util.find_spec("locust") is None:
        print("locust is not installed: .venv/bin/pip install -e '.[load]'", file=sys.stderr)
        return 2
    ours = urlsplit(options.url).hostname in ("127.0.0.1", "localhost", "::1")
    if (ours or options.allow_remote) and (why := trouble(options.url)) is not None:
        print(why, file=sys.stderr)
        return 2
    options.summary.unlink(missing_ok=True)
    for path in (options.summary, options.report):
        path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command_of(options), cwd=ROOT, check=False)
    if not options.summary.exists():
        return done.returncode or 1
    faults = show(json.loads(options.summary.read_text(encoding="utf-8")))
    print(f"summary in {options.summary}, report in {options.report}")
    return int(faults > 0)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.locust_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--scenario", default="mix", help="classify, repeated, label-sets, embed, probe or mix")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--spawn-rate", type=float, default=0.0, help="users begun in a second; 0: all at once")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=4096, help="distinct pictures")
    parser.add_argument("--size", default="224x224", help="of the pictures, WIDTHxHEIGHT")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--summary", type=lambda text: Path(text).absolute(), default="runs/load/summary.json")
    parser.add_argument("--report", type=lambda text: Path(text).absolute(), default="runs/load/report.html")
    parser.add_argument("--allow-remote", action="store_true", help="load another machine than this one: have leave to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
