"""The image's health check: exit status 0 when /readyz says yes, by the standard library alone."""

from __future__ import annotations

import http.client
import os
import sys

# Under the check's own time limit in the Dockerfile, so that this says why and not the engine.
SECONDS = 4.0


def main() -> int:
    """Ask the service in this container; prints what it said where that is not a yes."""
    port = int(os.environ.get("IRONCLIP_PORT") or 8000)
    # A service that listens on every interface is asked on this one; one address alone is asked there.
    host = os.environ.get("IRONCLIP_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        if answer.status == 200:
            return 0
        print(answer.read(1000).decode(errors="replace"))
    except (OSError, http.client.HTTPException) as error:
        print(f"{type(error).__name__}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
