"""`python -m service fleet`: one service process for each GPU of this host, behind one port.

All listen on `IRONCLIP_PORT` together, each while it is ready (`service.shared_port`), and each on a port of its own
for whoever wants to know how that one stands: the next ports in a row. A process that ends is started again, with
growing pauses; signals are handed on, and the fleet ends when all have drained.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ironclip.resources import usable_cpus
from service.decode_pace import decode_threads
from service.environment import process_environment
from service.settings import Settings, SettingsInvalid, load_settings

# Seconds before each start in a row; the last one is repeated. A process that ran so long begins anew.
_BACK_OFF = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_SETTLED = 60.0
_LOOK = 0.1
# Beyond what the settings allow for draining, before a process that does not end is killed.
_PATIENCE = 10.0
# The address, the settings or an encoder are at fault: what does not start the first time will not the second.
_FINAL = (1, 2, 3)
_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")
_PR_SET_PDEATHSIG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--devices",
        default="auto",
        metavar="LIST",
        help="with commas between: cuda:0,cuda:1 or cpu,cpu; auto (the default): every GPU there is, else one cpu",
    )


@dataclass
class _Member:
    device: str
    port: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    tries: int = 0
    began: float = 0.0
    due: float = 0.0

    def __str__(self) -> str:
        return f"{self.device} on port {self.port}"


def run(arguments: argparse.Namespace, overrides: dict[str, object]) -> int:
    """Run the processes until a signal comes; returns the exit status, as `--help` of the service explains it."""
    try:
        settings = load_settings(**overrides)
        members = plan(read_devices(arguments.devices), settings, overrides)
    except SettingsInvalid as error:
        print(f"The settings cannot be used:\n  {error.detail.replace(chr(10), chr(10) + '  ')}", file=sys.stderr)
        return 2
    _say(f"{len(members)} processes behind http://{settings.host}:{settings.port}")
    return Fleet(members, settings.drain_delay_seconds + settings.drain_seconds + _PATIENCE).run()


def read_devices(text: str) -> list[str]:
    """Devices from `--devices`; raises SettingsInvalid."""
    if text == "auto":
        return [f"cuda:{number}" for number in range(_gpus())] or ["cpu"]
    devices = [part.strip() for part in text.split(",")]
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise SettingsInvalid(f"--devices: {device!r} is neither cpu nor cuda:N; write cuda:0,cuda:1 or auto")
    return devices


def plan(devices: Sequence[str], settings: Settings, overrides: dict[str, object]) -> list[_Member]:
    """What each process is started with; raises SettingsInvalid where the ports do not suffice."""
    count = len(devices)
    ports = range(settings.port + 1, settings.port + 1 + count)
    metrics = range(settings.metrics_port, settings.metrics_port + count) if settings.metrics_port else range(0)
    if not settings.port or ports[-1] > 65535 or (metrics and metrics[-1] > 65535):
        raise SettingsInvalid(f"IRONCLIP_PORT: {count} processes need this port and the {count} above it; 0 has none")
    if set(metrics) & {settings.port, *ports}:
        raise SettingsInvalid(
            f"IRONCLIP_METRICS_PORT: {count} processes use {metrics[0]} to {metrics[-1]}, and {settings.port} to "
            f"{ports[-1]} for requests: keep them apart"
        )
    share = max(1, usable_cpus() // count)
    members = []
    for number, (device, port) in enumerate(zip(devices, ports, strict=True)):
        asked = {
            **overrides,
            "port": port,
            "shared_port": settings.port,
            # Each would take all cores otherwise, and all memory.
            "threads": settings.threads or share,
            "decode_workers": settings.decode_workers or decode_threads(settings.max_pixels, count),
        }
        if metrics:
            asked["metrics_port"] = metrics[number]
        members.append(_Member(device, port, process_environment(device, **asked)))
    return members


class Fleet:
    """Processes that are kept running.

    Args:
        members: as `plan` makes them.
        patience: seconds from the first signal until what still runs is killed.
    """

    def __init__(self, members: Sequence[_Member], patience: float) -> None:
        self._members = list(members)
        self._patience = patience
        self._signals: list[int] = []
        self._handed_on = 0
        self._stopping: float | None = None
        self._status = 0

    def run(self) -> int:
        """Start all, and look after them until they have ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        while True:
            self._hand_on()
            for member in self._members:
                self._look(member)
            if self._stopping is not None and not any(member.process for member in self._members):
                return self._status
            time.sleep(_LOOK)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _hand_on(self) -> None:
        for number in self._signals[self._handed_on :]:
            self._handed_on += 1
            self._stop(number)
        if self._stopping is not None and time.monotonic() > self._stopping + self._patience:
            for member in self._running():
                _say(f"{member}: does not end, is killed")
                member.process.kill()  # type: ignore[union-attr]
                self._status = self._status or 1
            self._stopping = float("inf")

    def _stop(self, number: int) -> None:
        if self._stopping is None:
            self._stopping = time.monotonic()
            _say("draining")
        for member in self._running():
            member.process.send_signal(number)  # type: ignore[union-attr]

    def _running(self) -> list[_Member]:
        return [member for member in self._members if member.process is not None and member.process.poll() is None]

    def _look(self, member: _Member) -> None:
        now = time.monotonic()
        if member.process is None:
            if self._stopping is None and now >= member.due:
                self._start(member)
            return
        status = member.process.poll()
        if status is None:
            return
        member.process = None
        if self._stopping is not None:
            return
        if status in _FINAL and member.starts == 1:
            _say(f"{member}: could not start (status {status})")
            self._status = status
            self._stop(signal.SIGTERM)
            return
        member.tries = 0 if now - member.began > _SETTLED else member.tries
        pause = _BACK_OFF[min(member.tries, len(_BACK_OFF) - 1)]
        member.tries, member.due = member.tries + 1, now + pause
        _say(f"{member}: ended with status {status}, is started again in {pause:g} s")

    def _start(self, member: _Member) -> None:
        member.process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env=member.environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which hands it on
            preexec_fn=_dies_with_us(),
        )
        member.starts, member.began = member.starts + 1, time.monotonic()
        _say(f"{member}: process {member.process.pid}")


def _dies_with_us() -> Callable[[], None] | None:
    """What has the kernel end a child when this process is killed; None where there is no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _gpus() -> int:
    """GPUs that torch sees, asked in a process of its own: torch is large, and this one only waits."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise SettingsInvalid(f"--devices auto: torch could not be asked for GPUs ({type(error).__name__})") from None


def _say(text: str) -> None:
    print(f"fleet: {text}", file=sys.stderr, flush=True)
