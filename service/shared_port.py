"""A port that several processes of one host listen on together; each is there while it is ready.

The kernel spreads new connections over the processes that listen (SO_REUSEPORT). So one that loads, drains or ails is
sent nothing new, and the others go on; its own port tells how it stands.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import uvicorn

from service import telemetry

_LOOK = 0.1
_AGAIN = 2.0  # seconds until the next try after the port could not be listened on


class SharedPort:
    """One process's place on a shared port.

    Args:
        host: address to listen on.
        port: the same for all processes, which must be of one user.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._log = telemetry.get_logger()
        self._listener: asyncio.Server | None = None

    async def keep(self, server: uvicorn.Server, ready: Callable[[], bool]) -> None:
        """Listen while ``ready`` says so, until cancelled; the server closes what listens when it shuts down."""
        while True:
            pause = _LOOK
            if ready() and self._listener is None:
                try:
                    await self._join(server)
                except OSError as error:
                    self._log.error("cannot listen on the shared port", port=self._port, reason=error.strerror)
                    pause = _AGAIN
            elif not ready() and self._listener is not None:
                self._leave(server)
            await asyncio.sleep(pause)

    async def _join(self, server: uvicorn.Server) -> None:
        config = server.config
        protocol_class: Any = config.http_protocol_class
        protocol = functools.partial(
            protocol_class,
            config=config,
            server_state=server.server_state,
            app_state=server.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            protocol,
            self._host,
            self._port,
            reuse_port=True,
            backlog=config.backlog,
        )
        server.servers.append(self._listener)
        self._log.info("listens on the shared port", port=self._port)

    def _leave(self, server: uvicorn.Server) -> None:
        """Be sent nothing new; connections that are there stay, and hear what the service has to say."""
        assert self._listener is not None
        self._listener.close()
        server.servers.remove(self._listener)
        self._listener = None
        self._log.info("left the shared port", port=self._port)
