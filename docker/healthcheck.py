"""The image's health check: exit status 0 when /readyz says yes, by the standard library alone.

It runs every few seconds, so it finds the address as the service does (command line over `IRONCLIP_*` variables over
the file that `IRONCLIP_CONFIG` names) without importing the service.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Under the check's own time limit in the Dockerfile, so that this says why and not the engine.
SECONDS = 4.0
# Process 1 is the service, or what starts it and names it (`docker run --init`).
COMMAND = Path("/proc/1/cmdline")


def main() -> int:
    """Ask the service in this container; prints what it said where that is not a yes."""
    try:
        host, port = address(COMMAND.read_bytes().decode(errors="replace").split("\0"), os.environ)
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        if answer.status == 200:
            return 0
        print(answer.read(1000).decode(errors="replace"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{type(error).__name__}: {error}")
    return 1


def address(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the service listens, as seen from here.

    Args:
        command: that the service was started with.
        environment: of the container, the service's too.

    Raises:
        ValueError: a port is no number, or the file is no TOML.
        OSError: the file cannot be read.
    """
    asked = {**_file(environment.get("IRONCLIP_CONFIG")), **_variables(environment), **_options(command)}
    host = str(asked.get("host") or "127.0.0.1")
    # A service that listens on every interface is asked on this one; one address alone is asked there.
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(asked.get("port", 8000))


def _file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    import tomllib

    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    found = {name.upper(): value for name, value in environment.items()}  # the service takes them in any case
    return {name: found[f"IRONCLIP_{name.upper()}"] for name in ("host", "port") if f"IRONCLIP_{name.upper()}" in found}


def _options(command: Sequence[str]) -> dict[str, str]:
    """`--host` and `--port`, which may be cut short (`--po 80`) there too."""
    arguments = command[command.index("service") + 1 :] if "service" in command else []
    if not any(argument.startswith("--") for argument in arguments):
        return {}
    import argparse

    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("--host", "--port"):
        parser.add_argument(name)
    return vars(parser.parse_known_args(arguments)[0])


if __name__ == "__main__":
    sys.exit(main())
