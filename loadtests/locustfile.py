"""Locust's file: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --scenario mix`; or `locust_run`.

Beside locust's own options it has --scenario, --pictures, --size, --seed, --summary (a JSON file of the result) and
--allow-remote: only the loopback is loaded without it. A key is taken from IRONCLIP_API_KEY.
"""

from __future__ import annotations

import ipaddress
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locust import events

from loadtests.machine import describe_commit, describe_machine
from loadtests.outcomes import plain_name, summarise
from loadtests.pictures import parse_size
from loadtests.users import SCENARIOS, EmbedUser, FreshUser, LabelSetUser, ProbeUser, RepeatedUser, Supply

__all__ = ["EmbedUser", "FreshUser", "LabelSetUser", "ProbeUser", "RepeatedUser"]


def is_loopback(url: str | None) -> bool:
    """Whether an address is of this machine alone."""
    host = urlsplit(url or "").hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """Add ours to locust's options."""
    group = parser.add_argument_group("Ironclip")
    group.add_argument("--scenario", choices=list(SCENARIOS), default="mix", help="which users")
    group.add_argument("--pictures", type=int, default=4096, help="distinct pictures, made before the load begins")
    group.add_argument("--size", default="224x224", help="of the pictures, WIDTHxHEIGHT")
    group.add_argument("--seed", type=int, default=0, help="of the pictures; those of another run may be cached")
    group.add_argument("--summary", default="", help="JSON file for the result")
    group.add_argument("--allow-remote", action="store_true", help="load another machine than this one: have leave to")


@events.init.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    """Check the target, make the pictures, and set how many users of each kind there are.

    Raises:
        SystemExit: the target is not this machine, or an option cannot be used.
    """
    options = environment.parsed_options
    if options is None:
        return
    target = options.host or environment.host
    if not is_loopback(target) and not options.allow_remote:
        raise SystemExit(
            f"{target or 'No host'} is not this machine: name --host http://127.0.0.1:PORT, or add --allow-remote"
        )
    try:
        size = parse_size(options.size)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.pictures < 1:
        raise SystemExit("--pictures must be at least 1")
    environment.supply = Supply(options.pictures, size, options.seed)
    weights = SCENARIOS[options.scenario]
    for user in environment.user_classes:
        user.weight = weights.get(user, 0)
    environment.user_classes = [user for user in environment.user_classes if user.weight]
    # gevent's clock stood still while the pictures were made, and --run-time would count from before.
    time.sleep(0.01)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def write_summary(environment: Any, **_: Any) -> None:
    """Write the result to --summary."""
    options = environment.parsed_options
    if options is None or not options.summary:
        return
    supply: Supply = environment.supply
    lasted = (environment.stats.last_request_timestamp or 0) - environment.stats.start_time
    rows, total = summarise(environment.stats.entries.values(), lasted)
    report = {
        "scenario": options.scenario,
        "users": options.num_users,
        "seconds": options.run_time,
        "lasted_seconds": round(lasted, 2),
        "size": options.size,
        "seed": options.seed,
        "machine": describe_machine(),
        **describe_commit(),
        "fresh_pictures": {"made": supply.made, "asked": supply.asked, "came_again": supply.asked > supply.made},
        "total": total,
        "requests": rows,
        "failures": [
            {"name": plain_name(error.name), "reason": str(error.error), "times": error.occurrences}
            for error in environment.stats.errors.values()
        ],
    }
    path = Path(options.summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
