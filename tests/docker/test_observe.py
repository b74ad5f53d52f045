"""What the dashboard and the alerts ask for is what the service tells: no panel stays empty after a rename.

There is one dashboard and one file of alerts, which Compose mounts and the Helm chart is made from; what the chart
makes of them is tested in tests/k8s/test_watching.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY

from service import telemetry
from service.app import ROUTERS

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "docker" / "observe"
CHART = ROOT / "k8s" / "ironclip"
ALERTS = CHART / "alerts.yml"
# Grafana's own variables, which PromQL does not know.
VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}
# What Prometheus adds to every series; namespace, service and pod are there in a cluster alone.
ADDED = {"instance", "job", "namespace", "service", "pod"}


def _dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "dashboards" / "ironclip.json").read_text(encoding="utf-8"))
    return found


def _queries() -> Iterator[tuple[str, str]]:
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield f"panel {panel['title']}", expression
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def _selectors(node: object) -> Iterator[Any]:
    """Every selector of a parsed expression, with its metric's name and its matchers."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        child = getattr(node, name, None)
        if child is not None and not callable(child):
            yield from _selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from _selectors(argument)


def _told() -> dict[str, set[str]]:
    """The names of the service's own series as Prometheus stores them, and the labels of each."""
    told: dict[str, set[str]] = {}
    for collector in vars(telemetry).values():
        if not hasattr(collector, "_labelnames"):
            continue
        (family,) = collector.describe()
        labels = set(collector._labelnames)
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[family.type]
        for suffix in suffixes:
            told[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return told


def _told_by_python() -> dict[str, set[str]]:
    """The series that the metrics library adds by itself, as they are scraped."""
    told: dict[str, set[str]] = {}
    for family in REGISTRY.collect():
        if family.name.startswith(("process_", "python_")):
            for sample in family.samples:
                told.setdefault(sample.name, set()).update(sample.labels)
    return told


def test_every_series_and_label_that_is_asked_for_is_told() -> None:
    told = _told() | _told_by_python()
    assert len(told) > 20
    asked = 0
    for where, expression in _queries():
        for selector in _selectors(promql_parser.parse(expression)):
            if selector.name == "up":
                continue
            asked += 1
            assert selector.name in told, f"{where} asks for {selector.name}, which service/telemetry.py does not have"
            labels = {matcher.name for matcher in selector.matchers.matchers} - ADDED
            assert labels <= told[selector.name], f"{where}: {selector.name} has no labels {labels}"
        names = set(re.findall(r"(?:ironclip|process|python)_\w+", expression))
        found = {selector.name for selector in _selectors(promql_parser.parse(expression))}
        assert names <= found, f"{where}: the test overlooked {names - found}"
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
        known = set().union(*(told[name] for name in names)) if names else set()
        assert grouped - ADDED <= known, f"{where} groups by {grouped - known}"
    assert asked > 30


def test_legends_name_labels_that_their_query_keeps() -> None:
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", []):
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert used <= kept, f"{panel['title']}: {used - kept}"


def test_every_metric_has_a_place_on_the_dashboard_or_in_an_alert() -> None:
    """A new metric that nobody would look at is either worth a panel or not worth its name."""
    text = " ".join(expression for _, expression in _queries())
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in _told()}
    assert {name for name in families if name not in text} == set()


def test_operations_and_results_in_matchers_exist() -> None:
    """A matcher's value is not a name that anything checks: `op="classfy"` would be an empty panel for ever."""
    operations = {
        route.endpoint.__name__ for router in ROUTERS for route in router.routes if hasattr(route, "endpoint")
    }
    seen = set()
    for _, expression in _queries():
        seen |= {name for found in re.findall(r'op=~?"([^"]+)"', expression) for name in found.split("|")}
    assert "classify" in seen
    assert seen <= operations
    cache = (ROOT / "service" / "cache.py").read_text(encoding="utf-8")
    results = {
        name
        for _, text in _queries()
        for found in re.findall(r'ironclip_cache_total\{[^}]*result=~?"([^"]+)"', text)
        for name in found.split("|")
    }
    assert results
    assert all(f'_count("{name}"' in cache for name in results), results


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    identifiers = []
    for panel in _dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        identifiers.append(panel["id"])
    assert len(set(identifiers)) == len(identifiers)


def test_provisioned_files_name_each_other() -> None:
    source = yaml.safe_load((OBSERVE / "grafana" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    provider = yaml.safe_load((OBSERVE / "grafana" / "dashboards" / "ironclip.yaml").read_text(encoding="utf-8"))
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["../k8s/ironclip/dashboards"] == provider["providers"][0]["options"]["path"]
    watched = dict(volume.split(":")[:2] for volume in compose["services"]["prometheus"]["volumes"])
    settings = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))
    assert [watched["../k8s/ironclip/alerts.yml"]] == settings["rule_files"]
    for folder in ("datasources", "dashboards"):
        assert mounts[f"./observe/grafana/{folder}"] == f"/etc/grafana/provisioning/{folder}"
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    (scraped,) = settings["scrape_configs"]
    assert set(scraped["dns_sd_configs"][0]["names"]) <= set(compose["services"])


def test_dashboard_shows_everything_where_there_is_no_cluster() -> None:
    """Under Compose no series has a namespace: "All" has to match what is not there."""
    variables = {entry["name"]: entry for entry in _dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "namespace", "service", "instance"}
    assert {entry["allValue"] for name, entry in variables.items() if name != "datasource"} == {".*"}
    for panel in _dashboard()["panels"]:
        for target in panel.get("targets", []):
            series = r"\b(?:ironclip|process|python)_\w+"
            assert not re.search(rf"{series}(?![\w{{])", target["expr"]), f"{panel['title']}: without the variables"
            for matchers in re.findall(rf"{series}\{{([^}}]*)\}}", target["expr"]):
                assert matchers.startswith('namespace=~"$namespace",service=~"$service",instance=~"$instance"')


def test_every_alert_asks_for_this_job_alone_and_says_what_to_do() -> None:
    """The chart puts the release in the place of the job: where that is missing, other releases would be asked."""
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    (scraped,) = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scraped["job_name"] == "ironclip"
    for rule in group["rules"]:
        for selector in _selectors(promql_parser.parse(rule["expr"])):
            assert {m.name: m.value for m in selector.matchers.matchers}["job"] == "ironclip", rule["alert"]
        assert not re.search(r"ironclip_\w+(?![\w{])", rule["expr"]), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_a_callers_own_deadline_wakes_nobody() -> None:
    """Who allows a millisecond is answered 504: that is seen where refusals are, and is no fault of the service."""
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    watched: dict[str, list[str]] = {status: [] for status in ("500", "503", "504")}
    for rule in group["rules"]:
        for codes in re.findall(r'code=~"([^"]*)"', rule["expr"]):
            for status, found in watched.items():
                if re.fullmatch(codes, status) and rule["labels"]["severity"] not in found:
                    found.append(rule["labels"]["severity"])
    assert watched == {"500": ["critical"], "503": ["warning"], "504": ["warning"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_prometheus_itself_takes_the_rules(tmp_path: Path) -> None:
    config = (OBSERVE / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text(encoding="utf-8"))
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/", f"{tmp_path}/"))
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
