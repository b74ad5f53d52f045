"""A port that several processes of one host listen on together; each is there while it is ready.

The kernel spreads new connections over the processes that listen (SO_REUSEPORT). So one that loads, drains or ails is
sent nothing new, and the others go on; its own port tells how it stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
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
                await self._leave(server)
            await asyncio.sleep(pause)

    async def _join(self, server: uvicorn.Server) -> None:
        self._listener = await asyncio.get_running_loop().create_server(
            _protocol_of(server),
            self._host,
            self._port,
            reuse_port=True,
            backlog=server.config.backlog,
        )
        server.servers.append(self._listener)
        self._log.info("listens on the shared port", port=self._port)

    async def _leave(self, server: uvicorn.Server) -> None:
        """Be sent nothing new; connections that are there stay, and hear what the service has to say.

        So do those that the kernel has given to this process and nobody has accepted yet: it would reset them.
        """
        listener, self._listener = self._listener, None
        assert listener is not None
        waiting = [connection for one in listener.sockets for connection in _accept_all(one.fileno())]
        listener.close()
        server.servers.remove(listener)
        self._log.info("left the shared port", port=self._port, waiting=len(waiting))
        loop = asyncio.get_running_loop()
        for connection in waiting:
            with contextlib.suppress(OSError):  # it has gone meanwhile
                await loop.connect_accepted_socket(_protocol_of(server), connection)


def _protocol_of(server: uvicorn.Server) -> Callable[[], asyncio.Protocol]:
    """What makes the protocol of a connection, as the server itself does."""
    protocol_class: Any = server.config.http_protocol_class
    return functools.partial(
        protocol_class,
        config=server.config,
        server_state=server.server_state,
        app_state=server.lifespan.state,
    )


def _accept_all(listening: int) -> list[socket.socket]:
    """The connections that wait at a listening socket, by its number."""
    found: list[socket.socket] = []
    with socket.socket(fileno=os.dup(listening)) as door, contextlib.suppress(OSError):  # BlockingIOError at the end
        door.setblocking(False)
        while True:
            connection, _ = door.accept()
            connection.setblocking(False)
            found.append(connection)
    return found
