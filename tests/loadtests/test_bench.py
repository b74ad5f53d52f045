"""The benchmark's arithmetic and its client, on costs that are known."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.bench_floor import Bare, Times, compare, summarise
from loadtests.client import Load, Refused, closed_loop, cycle, exchange, post
from loadtests.machine import describe_commit, describe_machine, process_seconds
from loadtests.pictures import make_pictures

ROOT = Path(__file__).parents[2]


def steady(seconds: float) -> Times:
    return Times([seconds] * 3, [seconds] * 3)


def test_floor_is_what_the_cores_left_by_the_client_could_do() -> None:
    # A batch of 32 takes 160 ms on both cores: 10 core-ms a picture; decoding takes 5. The client takes half a core.
    bare = Bare(steady(0.16), steady(0.02), steady(0.005), cores=2)
    load = Load(seconds=10, latencies=[0.03] * 800, client_cpu_seconds=5, server_cpu_seconds=8)
    result = compare(load, bare)
    assert result["floor_images_per_second"] == pytest.approx(1.5 / 0.015)
    assert result["share_of_floor"] == pytest.approx(0.8)
    assert result["latency_over_decode_and_forward"] == pytest.approx(0.03 / 0.025)
    assert result["service_core_ms"] == pytest.approx(10)
    assert result["share_of_floor_by_cpu_time"] == pytest.approx((0.005 + 0.005) / 0.01)


def test_medians_keep_the_shape_of_a_round() -> None:
    rounds = [{"raw": {"a": value}, "embed": {"1": {"b": 2 * value}}} for value in (1.0, 9.0, 2.0)]
    assert summarise(rounds) == {"raw": {"a": 2.0}, "embed": {"1": {"b": 4.0}}}


def test_pictures_are_distinct_and_the_same_for_a_seed() -> None:
    pictures = make_pictures((64, 48), 5, seed=3)
    assert len(set(pictures)) == 5
    assert pictures == make_pictures((64, 48), 5, seed=3)


def test_client_keeps_its_requests_in_flight_and_refuses_errors() -> None:
    flying, most, bodies = 0, 0, set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal flying, most
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                bodies.add(body)
                flying += 1
                most = max(most, flying)
                await asyncio.sleep(0.005)
                flying -= 1
                status = b"500 Oops" if body == b"bad" else b"200 OK"
                writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-type: text/plain\r\nContent-Length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        spent = functools.partial(process_seconds, os.getpid())
        port = server.sockets[0].getsockname()[1]
        requests = [post("/x", text, "text/plain") for text in (b"a", b"b", b"c")]
        load = await closed_loop(port, cycle(requests), 4, 0.2, spent)
        assert most == 4
        assert bodies == {b"a", b"b", b"c"}
        assert len(load.latencies) >= 12
        assert 0.004 < load.percentile(0.5) < 0.2
        assert load.rate == pytest.approx(len(load.latencies) / load.seconds)
        patient = await closed_loop(port, cycle(requests), 2, 0.1, spent, patient=True)
        assert (patient.refused, len(patient.latencies) >= 6) == (0, True)
        with pytest.raises(Refused, match="500"):
            await closed_loop(port, cycle([post("/x", b"bad", "text/plain")]), 2, 0.1, spent)
        server.close()

    asyncio.run(scenario())


def test_a_patient_client_comes_again_when_it_is_told_and_counts_the_wait() -> None:
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            status = b"429 No\r\nRetry-After: 1" if asked == 2 else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            await asyncio.sleep(0.01)
        writer.close()

    async def scenario() -> Load:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        request = cycle([post("/", b"", "text/plain")])
        load = await closed_loop(port, request, 1, 1.5, lambda: 0.0, patient=True)
        server.close()
        return load

    load = asyncio.run(scenario())
    assert load.refused == 1
    assert load.latencies[0] >= 1.0
    assert load.percentile(0.5) < 1.0


def test_answers_in_chunks_are_read_and_the_connection_stays_good() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n")
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        for _ in range(2):
            reply = await exchange(reader, writer, post("/", b"", "text/plain"))
            assert (reply.status, reply.body) == (200, b"hello world")
            assert reply.header("transfer-encoding") == "chunked"
            assert reply.header("retry-after") == ""
        writer.close()
        server.close()

    asyncio.run(scenario())


def test_results_name_the_machine_but_not_the_host() -> None:
    text = json.dumps([describe_machine(), describe_commit()])
    assert os.uname().nodename not in text
    assert "cores" in text


@pytest.mark.slow
def test_benchmark_runs_against_a_service_of_its_own() -> None:
    command = (
        "-m loadtests.bench_floor --model ViT-S-32-alt --rounds 1 --seconds 0.5 --pictures 20 --sizes 64x64 --name"
    )
    done = subprocess.run(
        [sys.executable, *command.split(), ""], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "c32:" in done.stdout
