"""The open loop: arrivals at random times, latency from those, and what refused callers do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from loadtests.client import percentile, post
from loadtests.open_loop import Outcome, Plan, arrivals, run, send, summarise
from loadtests.processes import ROOT
from loadtests.saturation import LEVELS, _parse, find_saturation, longest_round, main, turns_of, verdict

Answer = tuple[int, dict[str, str], bytes]


@contextlib.asynccontextmanager
async def answering(answer: Callable[[bytes], Answer], seconds: float = 0.0) -> AsyncIterator[int]:
    """An HTTP server on a port of its own that answers one request after the other, each after some seconds."""
    turn = asyncio.Lock()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                async with turn:
                    await asyncio.sleep(seconds)
                status, headers, content = answer(body)
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


def refusal(wait: str) -> Answer:
    return 429, {"Retry-After": wait}, json.dumps({"code": "overloaded", "limit_name": "queue-ms"}).encode()


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(200, 50, seed=1)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times)
    assert times[-1] < 50
    assert times == arrivals(200, 50, seed=1)
    assert times != arrivals(200, 50, seed=2)
    # Exponential gaps: as wide as they are long on average, and memoryless. 10,000 of them: four standard errors.
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.04)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.06)
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.95, 95), (0.99, 99), (0.995, 100), (1.0, 100)]
)
def test_percentiles_are_the_least_value_that_so_many_do_not_pass(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_a_percentile_of_nothing_is_no_number() -> None:
    assert math.isnan(percentile([], 0.5))


def test_latency_counts_from_the_due_time_of_a_server_that_falls_behind() -> None:
    """A server of 50 ms a request, asked 40 times a second: a closed loop would see 50 ms, callers wait for seconds."""

    async def scenario() -> list[Outcome]:
        async with answering(lambda body: (200, {}, body), 0.05) as port:
            return await send(Plan(port, [post("/", b"x", "text/plain")], rate=40, seconds=2.0, seed=3))

    outcomes = asyncio.run(scenario())
    assert len(outcomes) == len(arrivals(40, 2.0, 3))
    assert {one.status for one in outcomes} == {200}
    # By the clock: n answers of at least 50 ms each cannot end before n x 50 ms.
    last = outcomes[-1]
    assert last.due + last.latency >= 0.05 * len(outcomes)
    assert last.latency > 1.0


def test_refused_callers_leave_or_come_again_when_they_are_told() -> None:
    asked: list[float] = []

    def scenario(manner: str, first: Answer) -> tuple[list[Outcome], int]:
        asked.clear()

        def answer(body: bytes) -> Answer:
            asked.append(0.0)
            return first if len(asked) == 1 else (200, {}, b"")

        async def run_it() -> list[Outcome]:
            async with answering(answer) as port:
                plan = Plan(port, [post("/", b"x", "text/plain")], rate=2, seconds=0.9, seed=6, manner=manner)  # type: ignore[arg-type]
                return await send(plan)

        return asyncio.run(run_it()), len(asked)

    left, sent = scenario("leave", refusal("1"))
    assert [one.status for one in left] == [429, *[200] * (len(left) - 1)]
    assert sent == len(left)
    assert (left[0].limit, left[0].retry_after, left[0].tries) == ("queue-ms", 1.0, 1)

    honoured, sent = scenario("honour", refusal("1"))
    assert {one.status for one in honoured} == {200}
    assert sent == len(honoured) + 1
    assert honoured[0].tries == 2
    assert honoured[0].latency >= 1.0 > honoured[0].answer_seconds

    stormed, _ = scenario("storm", refusal("60"))
    assert stormed[0].status == 200
    assert stormed[0].latency < 30


def test_a_run_goes_on_where_the_last_one_ended() -> None:
    bodies: list[bytes] = []

    def answer(body: bytes) -> Answer:
        bodies.append(body)
        return 200, {}, b""

    async def scenario() -> int:
        async with answering(answer) as port:
            requests = [post("/", b"%d" % number, "text/plain") for number in range(1000)]
            first = await send(Plan(port, requests, rate=200, seconds=0.2))
            await send(Plan(port, requests, rate=200, seconds=0.2, first=len(first)))
            return len(first)

    sent = asyncio.run(scenario())
    assert sent > 10
    assert len(set(bodies)) == len(bodies) > sent


def test_a_caller_hangs_up_and_a_server_that_is_gone_is_no_crash() -> None:
    async def scenario() -> tuple[list[Outcome], list[Outcome]]:
        async with answering(lambda body: (200, {}, b""), 30) as port:
            slow = await send(Plan(port, [post("/", b"x", "text/plain")], rate=20, seconds=0.2, seed=1, patience=0.3))
        gone = await send(Plan(port, [post("/", b"x", "text/plain")], rate=20, seconds=0.2, seed=1))
        return slow, gone

    slow, gone = asyncio.run(scenario())
    assert slow
    assert {one.status for one in slow} == {-1}
    assert {one.status for one in gone} == {0}


def test_the_generator_is_a_process_of_its_own_and_says_why_it_failed() -> None:
    plan = Plan(9, [post("/", b"x", "text/plain")], rate=50, seconds=0.2)
    assert {one.status for one in run(plan)} == {0}  # nobody listens there
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(Plan(9, [b""], rate=0, seconds=1))


def test_a_summary_counts_what_came_in_time_and_what_was_refused() -> None:
    plan = Plan(0, [], rate=1, seconds=10)
    outcomes = [
        Outcome(0.5, status=200, latency=1.0, answer_seconds=1.0, tries=1),  # due and answered while warming up
        Outcome(1.9, status=200, latency=0.2, answer_seconds=0.2, tries=1),  # due then, and answered later
        *[Outcome(2.0 + i, status=200, latency=0.1 * (i + 1), answer_seconds=0.1, tries=1) for i in range(5)],
        Outcome(8, status=429, limit="queue-ms", retry_after=2.0, tries=1),
        # Answered when no more requests come: latency, not throughput.
        Outcome(9, status=200, latency=2.5, answer_seconds=0.4, limit="queue-ms", retry_after=2.0, tries=2),
        Outcome(9.5, status=-1, latency=30.0, tries=1),
    ]
    found = summarise(outcomes, plan, deadline=0.35, warm=2.0)
    assert found["requests"] == 8
    assert found["offered_per_second"] == 1.0
    assert found["answered_per_second"] == pytest.approx(6 / 8)
    assert found["goodput_per_second"] == pytest.approx(4 / 8, abs=1e-3)
    assert found["good_tries_per_second"] == pytest.approx(6 / 8, abs=1e-3)
    assert found["statuses"] == {"-1": 1, "200": 6, "429": 1}
    assert found["limits"] == {"queue-ms": 2}
    assert (found["refused"], found["refused_with_retry_after"]) == (2, 2)
    assert (found["came_again"], found["came_again_and_answered"]) == (1, 1)
    assert (found["p50_ms"], found["p99_ms"], found["admitted_p99_ms"]) == (300.0, 2500.0, 400.0)
    nothing = summarise([Outcome(1, status=0, tries=1)], plan, deadline=1)
    assert nothing["p99_ms"] is None
    assert json.dumps(nothing)


@pytest.mark.parametrize("start", [3.0, 50.0, 400.0])
def test_the_search_brackets_and_bisects(start: float) -> None:
    found, tried = find_saturation(lambda rate: rate <= 57, start, steps=8)
    assert 57 * 0.95 <= found <= 57
    assert tried <= 14


def test_a_service_that_sustains_nothing_or_everything_ends_the_search() -> None:
    assert find_saturation(lambda rate: False, 100, steps=4) == (0.0, 8)
    found, tried = find_saturation(lambda rate: True, 100, steps=4)
    assert (found, tried) == (100 * 2**7, 8)


def test_the_verdict_is_goodput_over_the_most_of_its_turn_and_p99_over_its_bound() -> None:
    def level(goodput: float, tries: float, p99: float | None) -> dict[str, float | None]:
        return {"goodput_per_second": goodput, "good_tries_per_second": tries, "admitted_p99_ms": p99}

    first = {"1x": level(50, 50, 900.0), "2x": level(46, 46, 1500.0), "2x honour": level(10, 48, 2400.0)}
    later = {"1x": level(20, 20, 900.0), "1.25x": level(25, 25, 900.0), "2x": level(20, 20, None)}
    # The machine was slow at first: what is judged is no part of its own peak.
    slow = {"1x": level(10, 10, 900.0), "2x": level(20, 20, 900.0)}
    rounds = [
        {"bound_ms": 2000.0, "search": [level(80, 80, 900.0)], "turns": [first]},
        {"bound_ms": 1000.0, "search": [level(10, 10, 900.0)], "turns": [later, slow]},
    ]
    one, other, third = turns_of(rounds)
    shares = {"goodput_share": 0.92, "share_of_most": 0.575, "tries_share": 0.92, "p99_over_bound": 0.75}
    assert verdict(one) == shares
    assert (verdict(one, "2x honour")["tries_share"], verdict(one, "2x honour")["p99_over_bound"]) == (0.96, 1.2)
    assert verdict(other) == {**dict.fromkeys(shares, 0.8), "p99_over_bound": math.inf}
    assert verdict(third)["goodput_share"] == 2.0
    dead = {"1x": level(0, 0, None), "2x": level(0, 0, None)}
    assert verdict(turns_of([{"bound_ms": 1.0, "search": [], "turns": [dead]}])[0])["share_of_most"] == 0


def test_how_long_a_round_takes_is_told_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert ("1.25x", 1.25, "leave") in LEVELS
    options = _parse(["--seconds", "10", "--search-seconds", "5", "--steps", "2", "--turns", "3"])
    assert longest_round(options) == 11 * 5 + 3 * len(LEVELS) * 10
    assert main(["--rounds", "0", "--name", ""]) == 0
    assert capsys.readouterr().out.startswith("0 rounds to run, of 8.3 minutes each at most")


@pytest.mark.slow
def test_saturation_is_found_on_a_real_service() -> None:
    options = "--model ViT-S-32-alt --seconds 4 --search-seconds 2 --steps 1 --turns 1 --rounds 1 --pictures 300"
    command = [sys.executable, "-m", "loadtests.saturation", *options.split(), "--name", ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1 rounds to run, of 0.7 minutes each at most")
    assert "at twice saturation" in done.stdout
    assert "all rounds are there" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (
            "bench_hits",
            "--model ViT-S-32-alt --seconds 0.5 --rounds 1 --pictures 8 --sizes 64x64",
            "of the empty route",
        ),
        ("bench_start", "--model ViT-S-32-alt --seconds 0.5 --rounds 1 --peers ironclip fastapi", "'ready_seconds'"),
    ],
)
def test_benchmarks_run_from_end_to_end(module: str, options: str, expected: str) -> None:
    command = [sys.executable, "-m", f"loadtests.{module}", *options.split(), "--name", ""]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(expected) >= 2
    assert "failed" not in done.stdout
