"""`python -m service`: serve, probe a picture, or print the settings' table or the OpenAPI document."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ironclip import __version__
from ironclip.errors import IronclipError
from service import fleet, keys_command, probe_command, selfcheck, telemetry
from service.connections import HTTP
from service.environment import let_idle_threads_sleep, traces_wanted
from service.heap import share_heaps
from service.metrics_port import MetricsPort
from service.settings import CONFIG_VARIABLE, Settings, SettingsInvalid, load_settings
from service.settings_table import settings_markdown
from service.shared_port import SharedPort
from service.tracing import Exporter
from service.without_compiler import without_compiler

if TYPE_CHECKING:
    from service.core import Service


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, as `--help` explains it."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "settings":
        print(settings_markdown() if arguments.markdown else _settings_text(), end="")
        return 0
    if arguments.command == "probe":
        return probe_command.run(arguments)
    if arguments.command == "selfcheck":
        return selfcheck.run(arguments)
    if arguments.command == "keys":
        return keys_command.run(arguments)
    overrides = {name: getattr(arguments, name) for name in ("host", "port", "encoders") if hasattr(arguments, name)}
    if arguments.command == "fleet":
        return fleet.run(arguments, overrides)
    try:
        if arguments.command == "openapi":
            return _print_openapi()
        return serve(load_settings(**overrides))
    except SettingsInvalid as error:
        print(f"The settings cannot be used:\n  {error.detail.replace(chr(10), chr(10) + '  ')}", file=sys.stderr)
        return 2


def serve(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit status."""
    for port in (settings.port, *filter(None, [settings.metrics_port])):
        fault = _address_fault(settings.host, port)
        if fault is not None:
            _say(f"Cannot listen on {settings.host}:{port}: {fault}")
            return 1
    if settings.shared_port:
        fault = _address_fault(settings.host, settings.shared_port, shared=True)
        if fault is not None:
            _say(f"Cannot share {settings.host}:{settings.shared_port}: {fault}")
            return 1
    # As process 1 of a container it would not hear the signal by default, not before uvicorn listens for it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    let_idle_threads_sleep()
    share_heaps()
    if settings.compile != "compile":
        with without_compiler():
            import open_clip  # noqa: F401  # with what it imports, before whoever else does
    from service.app import create_app
    from service.errors import WorkerLost

    telemetry.configure_logging(settings.log_level, settings.log_format)
    failures: list[IronclipError] = []

    def on_fatal(error: IronclipError) -> None:
        failures.append(error)
        server.should_exit = True

    traces = _open_traces()
    app = create_app(settings, on_fatal=on_fatal, traces=traces)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        http=HTTP,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        timeout_keep_alive=75,
        backlog=2048,
    )
    server = _Server(config, app.state.service, settings)
    metrics = MetricsPort(settings.host, settings.metrics_port) if settings.metrics_port else None
    address = f"http://{settings.host}:{settings.port}"
    _say(f"Ironclip {__version__} on {address} (playground: /, documentation: /docs); loading ...")
    try:
        server.run()
    except SystemExit:  # the address was taken since it was looked at; uvicorn has logged why
        return 1
    finally:
        if metrics is not None:
            metrics.close()
        if traces is not None:
            traces.close()
    if failures:
        lost = isinstance(failures[0], WorkerLost)
        _say(f"{'Ended, since' if lost else 'An encoder cannot be loaded:'} {failures[0].detail}")
        return 4 if lost else 3
    return 0 if server.started else 1


def _open_traces() -> Exporter | None:
    """The exporter that OpenTelemetry's variables ask for; raises SettingsInvalid."""
    if not traces_wanted():
        return None
    try:
        from service.otel import OtelExporter
    except ImportError:
        raise SettingsInvalid(
            "OTEL_EXPORTER_OTLP_ENDPOINT: traces need OpenTelemetry's packages: pip install 'ironclip[otel]', or "
            "leave the variable out, or set OTEL_SDK_DISABLED=true"
        ) from None
    return OtelExporter()


class _Server(uvicorn.Server):
    """A server that says no on /readyz first and stops listening a moment later, for balancers to notice."""

    def __init__(self, config: uvicorn.Config, service: Service, settings: Settings) -> None:
        super().__init__(config)
        self._service = service
        self._delay = settings.drain_delay_seconds
        self._draining = False
        self._shared = SharedPort(settings.host, settings.shared_port) if settings.shared_port else None
        self._sharing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and share the shared port from when the service is ready."""
        await super().startup(sockets)
        if self._shared is not None:
            self._sharing = asyncio.create_task(self._shared.keep(self, lambda: self._service.not_ready() is None))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening everywhere, and answer what is under way."""
        if self._sharing is not None:
            self._sharing.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal; a second one ends the waiting. Both end with status 0.

        A signal comes in the middle of anything, such as a lock being held: all that is more than a flag is done by the
        event loop, which is woken for it.
        """
        if self._draining:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._draining = True
        asyncio.get_event_loop().call_soon_threadsafe(self._drain, sig)

    def _drain(self, sig: int) -> None:
        self._service.drain()
        if self._delay > 0 and sig == signal.SIGTERM:
            asyncio.get_running_loop().call_later(self._delay, setattr, self, "should_exit", True)
        else:
            self.should_exit = True
        self._service.end_probes()


def _address_fault(host: str, port: int, *, shared: bool = False) -> str | None:
    """Why the address cannot be listened on, or None; found out before minutes are spent on loading."""
    faults: list[OSError] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        return str(error)
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
        except OSError as error:
            faults.append(error)
    taken = [error for error in faults if error.errno == errno.EADDRINUSE]
    # One family of addresses may be missing on this machine; both may not.
    return (taken or faults)[0].strerror if taken or len(faults) == len(found) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve CLIP encoders over HTTP: /classify, /embed, and more on /docs.",
        epilog=f"Settings come from IRONCLIP_* variables and the TOML file that {CONFIG_VARIABLE} names; "
        "`python -m service settings` lists them. Exit status: 1 the address cannot be listened on, 2 the "
        "settings cannot be used, 3 an encoder cannot be loaded, 4 a model worker or the decoder is lost.",
    )
    _serving(parser)
    parser.add_argument("--version", action="version", version=f"ironclip {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _serving(added.add_parser("serve", help="serve; also if no command is given"))
    fleeting = added.add_parser("fleet", help="serve with one process for each GPU of this host, behind one port")
    _serving(fleeting)
    fleet.add_arguments(fleeting)
    listed = added.add_parser("settings", help="list the settings")
    listed.add_argument("--markdown", action="store_true", help="as the table in docs/settings.md")
    added.add_parser("openapi", help="print the OpenAPI document")
    keys_command.add_arguments(added.add_parser("keys", help="make API keys, and check the file they are in"))
    checking = added.add_parser("selfcheck", help="prove on this machine that what is served is right, and how fast")
    selfcheck.add_arguments(checking)
    probing = added.add_parser("probe", help="attack one decision about one picture, without a server")
    probe_command.add_arguments(probing)
    return parser


def _serving(parser: argparse.ArgumentParser) -> None:
    # Suppressed defaults: those of a subcommand would overwrite what stands before it.
    parser.add_argument("--host", help="over IRONCLIP_HOST", default=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help="over IRONCLIP_PORT", default=argparse.SUPPRESS)
    text = "over IRONCLIP_ENCODERS: name=spec with commas between"
    parser.add_argument("--encoders", help=text, default=argparse.SUPPRESS)


def _settings_text() -> str:
    lines = []
    for name, field in Settings.model_fields.items():
        lines.append(f"IRONCLIP_{name.upper()}\n    {field.description}")
    return "\n".join(lines) + "\n"


def _print_openapi() -> int:
    from service.app import create_app

    print(json.dumps(create_app(load_settings()).openapi(), indent=1, ensure_ascii=False, sort_keys=True))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything has been stopped in order; taking torch's modules apart one by one would only add seconds.
    os._exit(status)
