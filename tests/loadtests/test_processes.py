"""A server as a tree of processes: what it costs, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtests.cells import Cells, OtherPlan, within
from loadtests.processes import ROOT, NotStarted, Tree, free_port, ironclip, published, running

# Answers /ready with 200; a child and a grandchild in a session of its own go on for ever, and ignore SIGTERM.
SERVER = """
import http.server, subprocess, sys, time
grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); block = bytearray(64 << 20); time.sleep(600)"
child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True); time.sleep(600)"
if sys.argv[2] == "family":
    subprocess.Popen([sys.executable, "-c", child])
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""  # noqa: E501


def command(port: int, kind: str) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), kind]


def until(true: object, seconds: float = 20) -> bool:
    assert callable(true)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_weighed_and_ended_with_all_that_it_started(tmp_path: Path) -> None:
    port = free_port()
    with running(command(port, "family"), port, tmp_path / "log", ready="/ready") as server:
        assert until(lambda: len(server.tree.alive()) == 3)
        assert until(lambda: server.tree.memory().once > 64)
        memory, counter = server.tree.memory(), server.tree.counter()
        assert memory.pss <= memory.once * 1.01
        assert 0.3 <= counter() < 60
        assert server.tree.cpu_seconds() == pytest.approx(counter(), abs=1)
        assert server.terminate(0.5) is None  # two of three do not listen
        pids = server.tree.alive()
        assert len(pids) == 2
    assert until(lambda: not any(Path(f"/proc/{pid}/environ").exists() for pid in pids))


def test_a_server_that_ends_is_seen_to_end(tmp_path: Path) -> None:
    port = free_port()
    with running(command(port, "alone"), port, tmp_path / "log", ready="/ready") as server:
        gone = server.terminate(20)
        assert gone is not None
        assert not server.tree.alive()


def test_what_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(NotStarted, match=r"(?s)ended with status 1:.*the reason"),
        running([sys.executable, "-c", "raise SystemExit('the reason')"], free_port(), tmp_path / "log"),
    ):
        pass
    with (
        pytest.raises(NotStarted, match="not ready in time"),
        running([sys.executable, "-c", "import time; time.sleep(60)"], free_port(), tmp_path / "log", seconds=0.5),
    ):
        pass
    with pytest.raises(NotStarted, match="cannot be started"), running(["/nowhere"], 1, tmp_path / "log"):
        pass


def test_who_is_terminated_takes_the_server_along(tmp_path: Path) -> None:
    """A benchmark that runs into a time limit leaves nothing behind."""
    port = free_port()
    script = (
        "import time; from pathlib import Path; from loadtests.processes import running\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"with running({command(port, 'family')!r}, {port}, log, ready='/ready') as server:\n"
        "    while len(server.tree.alive()) < 3: time.sleep(0.05)\n"
        "    print(*server.tree.alive(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert benchmark.stdout is not None
    pids = [int(pid) for pid in benchmark.stdout.readline().split()]
    assert len(pids) == 3
    benchmark.send_signal(signal.SIGTERM)
    assert benchmark.wait(30) == 128 + signal.SIGTERM
    assert until(lambda: not Tree(pids[0]).alive() and not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_server_can_be_kept_to_some_cores(tmp_path: Path) -> None:
    port, own = free_port(), os.sched_getaffinity(0)
    core = min(own)
    with running(command(port, "alone"), port, tmp_path / "log", ready="/ready", cpus=[core]) as server:
        assert os.sched_getaffinity(server.process.pid) == {core}
    assert os.sched_getaffinity(0) == own


def test_settings_from_outside_do_not_reach_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_MAX_BATCH", "1")
    _, environment = ironclip("a=random:RN50", 5, tmp_path, threads=2)
    ours = {name: value for name, value in environment.items() if name.startswith("IRONCLIP_")}
    assert ours["IRONCLIP_THREADS"] == "2"
    assert "IRONCLIP_MAX_BATCH" not in ours


def test_published_reasons_name_no_addresses_and_no_paths() -> None:
    text = "Looking in https://user:secret@registry.example/simple\nERROR: No module in /root/.venv/lib/x.py, see file:///opt/a"
    assert published(text) == "ERROR: No module in ..., see ..."
    assert published("") == ""
    assert published("images/s: 3/4 of them") == "images/s: 3/4 of them"


def test_cells_are_kept_and_gone_on_from_and_never_mixed(tmp_path: Path) -> None:
    path, plan = tmp_path / "results" / "x.json", {"seconds": 1, "model": "a"}
    cells = Cells(path, plan, {"commit": "abc", "modified": False})
    cells.put("1/a", {"rate": 5})
    cells.put("1/b", {"failed": "no"})
    again = Cells(path, plan, {"commit": "def", "modified": False})
    assert "1/a" in again
    assert "1/b" not in again  # is tried again, and stands in the result until then
    assert again.items()["1/b"]["failed"] == "no"
    again.put("1/b", {"rate": 6})
    assert [again.items()[key]["made"]["commit"] for key in ("1/a", "1/b")] == ["abc", "def"]
    with pytest.raises(OtherPlan, match=r"seconds.*--fresh"):
        Cells(path, {**plan, "seconds": 2}, {})
    assert "1/a" not in Cells(path, {**plan, "seconds": 2}, {}, fresh=True)
    assert not list(path.parent.glob("*.partial"))


def test_a_budget_ends_between_parts() -> None:
    done = []
    for name in within(["a", "b", "c", "d"], 0.5):
        time.sleep(0.2)
        done.append(name)
    assert done[:1] == ["a"]
    assert len(done) < 4
    assert list(within(["a", "b"], 0)) == ["a", "b"]
