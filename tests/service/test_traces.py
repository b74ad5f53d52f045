"""W3C trace context in and out, trace ids in the log, and spans that a real exporter sends to a collector."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.environment import traces_wanted
from service.settings import SettingsInvalid
from service.tracing import Context, Trace, read_context
from tests.service.collector import Collector, attributes
from tests.service.conftest import (
    ROOT,
    ServiceProcess,
    as_base64,
    launch_service,
    metric,
    picture,
    service_environment,
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
LABELS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def traced(collector: Collector, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service that sends its traces to the collector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        folder = tmp_path_factory.mktemp("traced")
        service = launch_service(folder, encoders=f"tiny={tiny_artifact}", log_format="json", idle_wait_ms=200)
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


def ask(url: str, seed: int, trace_id: str = "", flags: str = "01", **headers: str) -> httpx.Response:
    given = {"traceparent": f"00-{trace_id}-{PARENT}-{flags}"} if trace_id else {}
    body = {"image": as_base64(picture(seed)), "labels": LABELS}
    return httpx.post(f"{url}/classify", json=body, headers={**given, **headers}, timeout=30)


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        ([f"00-{TRACE}-{PARENT}-01"], (TRACE, PARENT, 1)),
        ([f" 00-{TRACE}-{PARENT}-00 "], (TRACE, PARENT, 0)),
        ([f"00-{TRACE}-{PARENT}-ff"], (TRACE, PARENT, 3)),  # flags that nobody knows yet are not passed on
        ([f"cc-{TRACE}-{PARENT}-01-what-comes"], (TRACE, PARENT, 1)),  # a version to come is read as far as it is known
        ([f"cc-{TRACE}-{PARENT}-01.what"], None),
        ([f"00-{TRACE}-{PARENT}-01-more"], None),
        ([f"ff-{TRACE}-{PARENT}-01"], None),
        ([f"00-{'0' * 32}-{PARENT}-01"], None),
        ([f"00-{TRACE}-{'0' * 16}-01"], None),
        ([f"00-{TRACE.upper()}-{PARENT}-01"], None),
        ([f"00-{TRACE[:-1]}-{PARENT}-01"], None),
        ([f"00-{TRACE}-{PARENT}-1"], None),
        ([f"00-{TRACE}-{PARENT}-01\n"], (TRACE, PARENT, 1)),
        ([f"00-{TRACE}-{PARENT}-01"] * 2, None),
        (["x" * 100_000], None),
        ([], None),
    ],
)
def test_contexts_are_read_as_w3c_says(parents: list[str], expected: tuple[str, str, int] | None) -> None:
    assert read_context(parents, []) == (Context(*expected) if expected else None)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["a=1,b@vendor=2"], "a=1,b@vendor=2"),
        (["a=1 , ,b=2", "c=3"], "a=1,b=2,c=3"),
        (["a=1,a=2"], ""),
        (["A=1"], ""),
        (["a=b=c"], ""),
        (["a=\x07"], ""),
        (["a=" + "x" * 600], ""),
        ([",".join(f"k{i}=1" for i in range(33))], ""),
        ([], ""),
    ],
)
def test_a_state_that_is_not_valid_is_dropped_alone(states: list[str], expected: str) -> None:
    found = read_context([f"00-{TRACE}-{PARENT}-01"], states)
    assert found == Context(TRACE, PARENT, 1, expected)


def test_where_nothing_is_configured_nothing_is_recorded_and_ids_differ() -> None:
    traces = [Trace(None) for _ in range(100)]
    assert len({trace.context.trace_id for trace in traces} | {trace.context.span_id for trace in traces}) == 200
    assert all(HEADER.fullmatch(trace.context.header()) and not trace.context.sampled for trace in traces)
    assert all(trace.recorder is None for trace in traces)


def test_context_in_and_out_and_in_the_log(tiny_service: ServiceProcess) -> None:
    trace_id = secrets.token_hex(16)
    answer = ask(tiny_service.url, 1, trace_id, tracestate="vendor=1")
    version, mine, span, flags = answer.headers["traceparent"].split("-")
    assert (version, mine, flags, answer.headers["tracestate"]) == ("00", trace_id, "01", "vendor=1")
    assert span != PARENT
    other = ask(tiny_service.url, 1, "0" * 32, tracestate="vendor=1")
    assert HEADER.fullmatch(other.headers["traceparent"])
    assert "0" * 32 not in other.headers["traceparent"]
    assert "tracestate" not in other.headers
    refused = httpx.get(f"{tiny_service.url}/nothing", headers={"traceparent": f"00-{trace_id}-{PARENT}-00"})
    assert refused.headers["traceparent"].startswith(f"00-{trace_id}-")
    deadline = time.monotonic() + 10  # the line is written when the answer has gone out
    found: list[dict[str, Any]] = []
    while len(found) < 2 and time.monotonic() < deadline:
        found = [json.loads(line) for line in tiny_service.log.read_text().splitlines() if trace_id in line]
    assert [(line["event"], line["trace_id"], line["status"]) for line in found] == [
        ("request", trace_id, 200),
        ("request", trace_id, 404),
    ]


def test_without_opentelemetrys_variables_it_is_not_imported() -> None:
    """(redis-py imports the SDK's metrics by itself where they are installed; ours is the part that makes traces.)"""
    code = (
        "import sys, service.__main__ as main; assert main._open_traces() is None; "
        "print([n for n in ('service.otel', 'opentelemetry.exporter', 'opentelemetry.sdk.trace') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=service_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "otlp"),
    ],
)
def test_what_cannot_be_sent_is_said_at_the_start(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=said):
        traces_wanted()


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_when_traces_are_wanted(variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces_wanted() is wanted


def test_the_span_tree_of_a_request(traced: ServiceProcess, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    answer = ask(traced.url, 11, trace_id, tracestate="vendor=1")
    assert answer.status_code == 200
    spans = collector.of(trace_id, "POST /classify")
    by_name: dict[str, list[Any]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    assert set(by_name) == {
        "POST /classify", "receive", "cache", "decode", "labels", "model", "queue", "forward", "decide", "serialise",
    }  # fmt: skip
    assert len(by_name["queue"]) == len(by_name["forward"])  # each wait is noted once
    timed = [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")]
    assert [name for name in timed if name in ("queue", "model", "decide")] == ["queue", "model", "decide"]
    (root,) = by_name["POST /classify"]
    assert root.parent_span_id.hex() == PARENT
    assert root.trace_state == "vendor=1"
    assert answer.headers["traceparent"] == f"00-{trace_id}-{root.span_id.hex()}-01"
    about = attributes(root)
    assert about["http.route"] == "/classify"
    assert about["http.response.status_code"] == 200
    assert about["ironclip.request_id"] == answer.headers["x-request-id"]
    ids = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        if span is not root:
            parent = ids[span.parent_span_id]
            expected = {"model", "labels"} if span.name in ("queue", "forward") else {"POST /classify"}
            assert parent.name in expected, span.name
            slack = 2_000_000  # two clocks are compared
            assert parent.start_time_unix_nano - slack <= span.start_time_unix_nano, span.name
            assert span.end_time_unix_nano <= parent.end_time_unix_nano + slack, span.name
    assert {ids[span.parent_span_id].name for span in by_name["forward"]} == {"model", "labels"}
    assert collector.resource["service.name"] == "ironclip"
    assert collector.resource["deployment.environment.name"] == "tests"
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 60


def six_at_once(traced: ServiceProcess, collector: Collector, seed: int) -> dict[bytes, set[bytes]]:
    """Six requests sent together: by the batch that their forward is linked to, their root spans."""
    traces = [secrets.token_hex(16) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask(traced.url, seed + i, traces[i]), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    linked: dict[bytes, set[bytes]] = {}
    for trace_id in traces:
        spans = collector.of(trace_id, "POST /classify")
        (root,) = [span for span in spans if span.name == "POST /classify"]
        (forward,) = [span for span in spans if span.name == "forward"]
        (link,) = forward.links
        linked.setdefault(link.span_id, set()).add(root.span_id)
    return linked


def test_one_span_of_a_batch_for_all_its_requests(traced: ServiceProcess, collector: Collector) -> None:
    """Requests that come together share a batch: its span is linked to each of them, and theirs to it."""
    ask(traced.url, 20)  # the labels are known from here on
    shared = False
    for turn in range(20):  # the forward is so short that all six of a turn may miss each other
        linked = six_at_once(traced, collector, 1000 + 6 * turn)
        batches = {
            span.span_id: span
            for span in collector.wait(
                lambda spans, linked=linked: linked.keys() <= {s.span_id for s in spans if s.name == "batch"}
            )
            if span.name == "batch"
        }
        for identity, requests in linked.items():
            batch = batches[identity]
            assert {link.span_id for link in batch.links} == requests
            assert not batch.parent_span_id
            assert attributes(batch)["ironclip.items"] == len(requests)
        shared = len(linked) < 6
        if shared:
            break
    assert shared, "no two of six requests at once shared a batch, twenty times"


def test_whoever_says_not_to_be_recorded_is_not(traced: ServiceProcess, collector: Collector) -> None:
    unwanted, wanted = secrets.token_hex(16), secrets.token_hex(16)
    assert ask(traced.url, 31, unwanted, flags="00").headers["traceparent"].endswith("-00")
    httpx.get(f"{traced.url}/readyz", headers={"traceparent": f"00-{unwanted}-{PARENT}-01"})  # a probe of health
    ask(traced.url, 32, wanted)
    collector.of(wanted, "POST /classify")  # the later one is there
    assert not [span for span in collector.spans if span.trace_id.hex() == unwanted]


def test_a_cached_answer_has_no_model_and_a_refusal_has_its_code(traced: ServiceProcess, collector: Collector) -> None:
    ask(traced.url, 41)
    cached, bad = secrets.token_hex(16), secrets.token_hex(16)
    assert ask(traced.url, 41, cached).headers["cache-status"] == "ironclip; hit"
    names = {span.name for span in collector.of(cached, "POST /classify")}
    assert names == {"POST /classify", "receive", "cache", "serialise"}
    body = {"image": "AAAA", "labels": LABELS}
    httpx.post(f"{traced.url}/classify", json=body, headers={"traceparent": f"00-{bad}-{PARENT}-01"})
    (root,) = [span for span in collector.of(bad, "POST /classify") if span.name == "POST /classify"]
    assert attributes(root)["error.type"].startswith("image-")
    assert root.status.code == 0  # the caller's fault is no error of the service


@pytest.mark.parametrize("later", [False, True])
def test_a_probe_is_one_span(later: bool, traced: ServiceProcess, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"} | ({"Prefer": "respond-async"} if later else {})
    body = {"image": as_base64(picture(51 + later)), "labels": LABELS, "max_eps": 4, "gradients": 60}
    answer = httpx.post(f"{traced.url}/attack-probe", json=body, headers=headers, timeout=30)
    assert answer.status_code == (202 if later else 200), answer.text
    (probe,) = [span for span in collector.of(trace_id, "probe") if span.name == "probe"]
    about = attributes(probe)
    assert about["ironclip.outcome"] == "done"
    assert about["ironclip.pieces"] > 3
    assert 0 < about["ironclip.busy_ms"] <= (probe.end_time_unix_nano - probe.start_time_unix_nano) / 1e6 + 1
    assert about["ironclip.gradients"] > 0
    spans = collector.of(trace_id, "POST /attack-probe")
    assert len(spans) < 20, "a span for each piece"
    if later:
        (root,) = [span for span in spans if span.name == "POST /attack-probe"]
        assert probe.parent_span_id == root.span_id or probe.parent_span_id in {span.span_id for span in spans}


def test_no_collector_costs_spans_and_nothing_else(traced: ServiceProcess, collector: Collector) -> None:
    """Answers go out as before, the log says once that traces are lost, and the service stops as ever. Last here."""
    collector.close()
    assert {ask(traced.url, seed).status_code for seed in range(60, 90)} == {200}
    deadline = time.monotonic() + 30
    while metric(traced.url, 'ironclip_trace_spans_total{result="failed"}') == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert metric(traced.url, 'ironclip_trace_spans_total{result="sent"}') > 0
    assert ask(traced.url, 91).status_code == 200
    assert traced.stop() == 0
    lines = [json.loads(line) for line in traced.log.read_text().splitlines() if line.startswith("{")]
    warnings = [line["event"] for line in lines if line["level"] in ("warning", "error")]
    assert warnings == ["traces cannot be sent; spans are dropped until they can"]
