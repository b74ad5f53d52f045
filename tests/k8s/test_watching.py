"""What the chart makes of the one dashboard and the one file of alerts, and by what it scales.

That these files ask for metrics that the service has is tested in tests/docker/test_observe.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import promql_parser
import yaml
from prometheus_client import REGISTRY

from service import telemetry
from tests.k8s.conftest import CHART, NAMESPACE, Chart, ci_file, only

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
