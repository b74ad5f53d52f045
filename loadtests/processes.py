"""A server as a process of its own, with all that it starts: until it is ready, what it costs, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from loadtests.client import Refused, fetch

ROOT = Path(__file__).parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_LAST_CHARACTERS = 2000


class NotStarted(Exception):
    """A server ended before it was ready, or took too long; the text has the end of its log."""


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int
    seconds: float
    started: int


class Tree:
    """The processes of one server: the one that was started, its descendants, and all of its session.

    Args:
        pid: the first process, which leads a session of its own.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # By when they began: a number is used again. Kept, since a process whose parent ended has another one.
        self._seen: dict[int, int] = {}

    def alive(self) -> list[int]:
        """Numbers of the processes that run now."""
        return list(self._members())

    def cpu_seconds(self) -> float:
        """CPU seconds, user and system, of all of them and of their children that have ended."""
        return sum(stat.seconds for stat in self._members().values())

    def counter(self) -> CpuSeconds:
        """`cpu_seconds` of those that run now, cheap enough to ask after every reply."""
        return CpuSeconds(self.alive())

    def memory(self) -> Memory:
        """Memory of all of them now."""
        each = [_rollup(pid) for pid in self.alive()]
        private = sum(one.get("Private_Clean", 0) + one.get("Private_Dirty", 0) for one in each)
        shared = max((one.get("Shared_Clean", 0) + one.get("Shared_Dirty", 0) for one in each), default=0)
        return Memory((private + shared) / 1024, sum(one.get("Pss", 0) for one in each) / 1024)

    def kill(self) -> None:
        """End all of them at once."""
        self.send(signal.SIGKILL)

    def send(self, what: signal.Signals) -> None:
        """Send all of them a signal; one that has ended meanwhile is passed over."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, what)

    def _members(self) -> dict[int, _Stat]:
        every = {int(path.name): stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(int(path.name)))}
        members = {
            pid
            for pid, stat in every.items()
            if pid == self.pid or stat.session == self.pid or self._seen.get(pid) == stat.started
        }
        while more := {pid for pid, stat in every.items() if stat.parent in members and pid not in members}:
            members |= more
        self._seen |= {pid: every[pid].started for pid in members}
        return {pid: every[pid] for pid in members if every[pid].state != "Z"}


@dataclass(frozen=True)
class Memory:
    """Resident memory of a server, MiB.

    Attributes:
        once: private pages of all its processes, and the shared pages of the one that has most of those. Unlike PSS it
            does not shrink when somebody else on the machine, such as who measures, has the same libraries loaded.
        pss: the kernel's proportional set size: shared pages divided among all who share them.
    """

    once: float
    pss: float


class CpuSeconds:
    """CPU seconds of a fixed set of processes; one that has ended keeps its last count."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._last = dict.fromkeys(pids, 0.0)

    def __call__(self) -> float:
        """Their sum."""
        for pid in self._last:
            if stat := _stat(pid):
                self._last[pid] = stat.seconds
        return sum(self._last.values())


def _stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    ticks = sum(int(fields[i]) for i in (11, 12, 13, 14))
    return _Stat(fields[0], int(fields[1]), int(fields[3]), ticks / _TICK, int(fields[19]))


def _rollup(pid: int) -> dict[str, int]:
    """Sums over a process's mappings, KiB; nothing for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Running:
    """A server that is ready.

    Attributes:
        port: on 127.0.0.1.
        ready_seconds: from its start until it said that it was ready.
    """

    port: int
    process: subprocess.Popen[bytes]
    tree: Tree
    ready_seconds: float
    log: Path

    def terminate(self, seconds: float) -> float | None:
        """Send SIGTERM to the first process; seconds until all have ended, None where that took too long."""
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        while time.monotonic() - began < seconds:
            self.process.poll()
            if not self.tree.alive():
                return time.monotonic() - began
            time.sleep(0.02)
        return None


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    ready: str = "/readyz",
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
    cpus: Sequence[int] = (),
) -> Iterator[Running]:
    """Run a server from the root of the checkout; whatever is left of it at the end is killed.

    Args:
        command: what starts it.
        port: that it will listen on.
        log: file for what it writes.
        ready: path that answers 200 when it can be used.
        environment: in place of this process's own.
        seconds: until it must be ready.
        cpus: cores that it may use; all of this process's if empty.

    Raises:
        NotStarted: it ended, or was not ready in time.
    """
    began = time.monotonic()
    with log.open("wb") as file:
        process = _started(command, file, environment, cpus)
    tree = Tree(process.pid)
    with _terminated_in_order(), _stopped_at_the_end(process, tree):
        asyncio.run(_until_ready(port, ready, process, log, began + seconds))
        tree.alive()
        yield Running(port, process, tree, time.monotonic() - began, log)


@contextlib.contextmanager
def _stopped_at_the_end(process: subprocess.Popen[bytes], tree: Tree) -> Iterator[None]:
    try:
        yield
    finally:
        tree.alive()  # while the first process is there to tell its descendants
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        # Some servers end before what they have started does, or not at all.
        tree.kill()
        process.wait()


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl+C does, so that a server in a session of its own does not outlive it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _started(
    command: Sequence[str], log: IO[bytes], environment: Mapping[str, str] | None, cpus: Sequence[int]
) -> subprocess.Popen[bytes]:
    own = os.sched_getaffinity(0)
    if cpus:  # inherited by the child from its first instruction on
        os.sched_setaffinity(0, cpus)
    try:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        raise NotStarted(f"{command[0]} cannot be started: {error}") from error
    finally:
        os.sched_setaffinity(0, own)


async def _until_ready(port: int, path: str, process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotStarted(f"ended with status {process.returncode}:\n{_end_of(log)}")
        with contextlib.suppress(OSError, Refused, asyncio.IncompleteReadError, TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(fetch(port, path), 5)
            return
        await asyncio.sleep(0.05)
    raise NotStarted(f"was not ready in time:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_LAST_CHARACTERS:]


def published(text: str) -> str:
    """The last line of a message, fit for a result file: no addresses, and no paths of the machine."""
    last = next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")
    return re.sub(r"\S*://\S+|(?<![\w.])~?/[^\s'\":,)]+", "...", last.strip())[:300]


def ironclip(encoders: str, port: int, state: Path, **settings: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service with these settings and none from outside."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("IRONCLIP_")}
    own = {"encoders": encoders, "port": port, "state_dir": state, "log_level": "warning", **settings}
    named = {f"IRONCLIP_{name.upper()}": str(value) for name, value in own.items()}
    return [sys.executable, "-m", "service"], plain | named
