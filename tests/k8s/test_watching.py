"""What the chart makes of the one dashboard and the one file of alerts, and by what it scales.

That these files ask for metrics that the service has is tested in tests/docker/test_observe.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY

from service import telemetry
from tests.k8s.conftest import CHART, NAMESPACE, Chart, ci_file, only
from tests.k8s.test_render import check

DASHBOARD = json.loads((CHART / "dashboards" / "ironclip.json").read_text(encoding="utf-8"))
ALERTS = {
    rule["alert"]: rule
    for rule in yaml.safe_load((CHART / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
}
LIMITS = {
    "IronclipQueueLong": "queueSeconds",
    "IronclipSlow": "latencySeconds",
    "IronclipServerErrors": "errorShare",
    "IronclipRefusing": "refusedShare",
}
MATCHER = f'namespace="{NAMESPACE}",service="rel-ironclip-metrics"'


def _known() -> dict[str, set[str]]:
    """Every series that the service can have -> its labels."""
    found: dict[str, set[str]] = {}
    for collector in vars(telemetry).values():
        if not hasattr(collector, "_labelnames"):
            continue
        labels = set(collector._labelnames)
        for name in REGISTRY._collector_to_names[collector]:
            found[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    return found


def _ask(expression: str) -> None:
    """Fail where the expression does not parse or asks for what the service does not have."""
    promql_parser.parse(expression)
    known = _known()
    added = {"namespace", "service", "pod"}  # by the ServiceMonitor
    asked = re.findall(r"(ironclip_\w+)\{([^}]*)\}", expression)
    assert asked, expression
    for name, matchers in asked:
        assert name in known, name
        for label in re.findall(r"(\w+)\s*=?[=!]~?", re.sub(r'"[^"]*"', "", matchers)):
            assert label in known[name] | added, (name, label)
    labels = set().union(*(known[name] for name, _ in asked)) | added
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {part.strip() for part in group.split(",")} <= labels, expression


def _rules(chart: Chart, values: dict[str, Any] | None = None) -> dict[str, Any]:
    rule = only(chart.render(values, files=[ci_file("production")]), "PrometheusRule")
    (group,) = rule["spec"]["groups"]
    assert len({alert["alert"] for alert in group["rules"]}) == len(group["rules"])
    return {alert["alert"]: alert for alert in group["rules"]}


def test_the_alerts_are_those_of_the_file_asked_of_this_release(chart: Chart) -> None:
    rules = _rules(chart)
    assert set(rules) == set(ALERTS)
    for name, rule in rules.items():
        promql_parser.parse(rule["expr"])
        expected = ALERTS[name]["expr"].replace('job="ironclip"', MATCHER)
        end = "> [0-9.]+$" if name in LIMITS else "$^"
        assert re.sub(end, "", rule["expr"]) == re.sub(end, "", expected)
        assert rule["annotations"]["runbook_url"]
        assert {**rule["annotations"], **ALERTS[name]["annotations"]} == rule["annotations"]
        assert (rule["labels"], rule.get("for")) == (ALERTS[name]["labels"], ALERTS[name].get("for"))


def test_the_values_move_the_limits(chart: Chart) -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["metrics"]["prometheusRule"]
    for name, key in LIMITS.items():
        assert float(ALERTS[name]["expr"].rpartition("> ")[2]) == defaults[key], f"{name}: two defaults"
    for name, rule in _rules(chart, {f"metrics.prometheusRule.{key}": 0.125 for key in LIMITS.values()}).items():
        assert rule["expr"].endswith("> 0.125") == (name in LIMITS)


def _operations(expression: str) -> list[set[str]]:
    return [set(found.split("|")) for found in re.findall(r'op=~"([^"]+)"', expression)]


def test_probes_of_the_kubelet_do_not_dilute_errors() -> None:
    """They come every few seconds: beside them the failures of few callers would be less than the alert's share."""
    for name in ("IronclipServerErrors", "IronclipRefusing"):
        part, whole = _operations(ALERTS[name]["expr"])
        assert part == whole, name
        assert not whole & {"livez", "readyz", "metrics", "oip_live", "oip_ready"}, name
        assert {"classify", "embed", "openai_embeddings", "oip_infer"} <= whole, name


def test_who_was_never_up_is_not_down() -> None:
    """The two alerts divide what does not answer, and wake somebody for one of them alone."""
    down, never = (promql_parser.parse(ALERTS[name]["expr"]) for name in ("IronclipDown", "IronclipNeverUp"))
    assert str(down).replace(" and ", " unless ") == str(never)
    assert "max_over_time(up" in str(down)
    assert [ALERTS[name]["labels"]["severity"] for name in ("IronclipDown", "IronclipNeverUp")] == [
        "critical",
        "warning",
    ]
    # The startup probe gives a pod 20 minutes.
    assert ALERTS["IronclipNeverUp"]["for"] == "30m"


DOWN = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'up{job="ironclip",instance="old"}', values: '1x10 0x80'}
      - {series: 'up{job="ironclip",instance="new"}', values: '0x20 1x70'}
      - {series: 'up{job="ironclip",instance="lost"}', values: '0x90'}
    alert_rule_test:
      - {eval_time: 10m, alertname: IronclipDown, exp_alerts: []}
      - eval_time: 15m
        alertname: IronclipDown
        exp_alerts: [{exp_labels: {severity: critical, job: ironclip, instance: old}}]
      - {eval_time: 20m, alertname: IronclipNeverUp, exp_alerts: []}
      - eval_time: 40m
        alertname: IronclipNeverUp
        exp_alerts: [{exp_labels: {severity: warning, job: ironclip, instance: lost}}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_prometheus_itself_tells_new_from_gone(tmp_path: Path) -> None:
    rules = yaml.safe_load((CHART / "alerts.yml").read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        rule.pop("annotations")
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (tmp_path / "test.yml").write_text(DOWN, encoding="utf-8")
    result = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboard_reaches_grafana_whole(chart: Chart) -> None:
    config = only(chart.render(files=[ci_file("production")]), "ConfigMap", "-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = config["data"].values()
    assert json.loads(text) == DASHBOARD


def test_replicas_follow_the_queue(chart: Chart) -> None:
    manifests = chart.render(files=[ci_file("production")])
    scaled = only(manifests, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 8)
    assert scaled["scaleTargetRef"]["name"] == only(manifests, "Deployment")["metadata"]["name"]
    triggers = {trigger["name"]: trigger["metadata"] for trigger in scaled["triggers"]}
    for metadata in triggers.values():
        _ask(metadata["query"])
        # The labels by which it asks are those that the ServiceMonitor's Service gives.
        assert f'service="{only(manifests, "Service", "-metrics")["metadata"]["name"]}"' in metadata["query"]
        assert metadata["ignoreNullValues"] == "false"
    assert "ironclip_queue_seconds_estimate" in triggers["queue-seconds"]["query"]
    assert float(triggers["queue-seconds"]["threshold"]) == 0.5
    hpa = only(chart.render(files=[ci_file("gateway-hpa")]), "HorizontalPodAutoscaler")["spec"]
    metric: Any = hpa["metrics"][0]["pods"]
    assert metric["metric"]["name"] in _known()
    assert metric["target"] == {"type": "AverageValue", "averageValue": "250m"}
    assert len(hpa["metrics"]) == 1
    busy = {"autoscaling.hpa.busyMetricName": "ironclip_busy_share", "autoscaling.busyShare": 0.75}
    two = only(chart.render(busy, files=[ci_file("gateway-hpa")]), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert two[0] == hpa["metrics"][0]
    assert two[1]["pods"]["metric"]["name"] == "ironclip_busy_share"
    assert two[1]["pods"]["target"] == {"type": "AverageValue", "averageValue": "750m"}


def test_keda_shows_prometheus_who_it_is(chart: Chart) -> None:
    keda = "autoscaling.keda"
    given = {
        f"{keda}.authenticationRef": "prom",
        f"{keda}.authenticationKind": "ClusterTriggerAuthentication",
        f"{keda}.authModes": "bearer",
    }
    scaled = only(chart.render(given, files=[ci_file("production")]), "ScaledObject")
    check(scaled, "1.34")
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["authenticationRef"] == {"name": "prom", "kind": "ClusterTriggerAuthentication"}
        assert trigger["metadata"]["authModes"] == "bearer"
    plain = only(chart.render(files=[ci_file("production")]), "ScaledObject")["spec"]["triggers"][0]
    assert "authenticationRef" not in plain
    assert "authModes" not in plain["metadata"]
