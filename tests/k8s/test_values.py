"""What the chart refuses, and that its values, schema and documents say the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
import yaml

from docs import chart as documents
from service.settings import Settings
from tests.k8s.conftest import CHART, ROOT, Chart, only

FOUR: dict[str, Any] = {"replicaCount": 4, "redis.mode": "internal"}
ROUTE: dict[str, Any] = {"httpRoute.enabled": True, "httpRoute.parentRefs": [{"name": "public"}]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replicaCount": 2, "redis.mode": "internal", "dtype": "auto"}, "at '/dtype': value must be one of 'float32'"),
    ({"autoscaling.enabled": True, "redis.mode": "internal", "dtype": "auto"}, "at '/dtype': value must be one of"),
    ({"dtype": "int4"}, "at '/dtype'"),
    ({"gpu.enabled": True, "dtype": "int8"}, "at '/dtype'"),
    ({"replicaCount": 0}, "at '/replicaCount': minimum: got 0, want 1"),
    ({"replicaCount": 2}, "several replicas need a Redis"),
    ({"autoscaling.enabled": True}, "several replicas need a Redis"),
    ({"replicaCount": 2, "redis.mode": "internal", "state.existingClaim": "a"}, "state.existingClaim is for one"),
    ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}, "redis.mode": "internal"}, "larger than"),
    ({"autoscaling.minReplicas": 0}, "at '/autoscaling/minReplicas'"),
    ({"replicas": 3}, "additional properties 'replicas' not allowed"),
    ({"image.sha": "x"}, "at '/image': additional properties 'sha' not allowed"),
    ({"image.digest": "sha256:abc"}, "at '/image/digest'"),
    ({"settings.max_bacth": 3}, "at '/settings': additional properties 'max_bacth' not allowed"),
    ({"settings.max_batch": 0}, "at '/settings/max_batch': minimum: got 0, want 1"),
    ({"settings.max_batch": "many"}, "at '/settings/max_batch': got string, want integer"),
    ({"settings.log_level": "loud"}, "at '/settings/log_level'"),
    ({"settings.redis_url": "redis://u:p@h"}, "at '/settings': additional properties 'redis_url' not allowed"),
    ({"settings.drain_seconds": 5}, "at '/settings': additional properties 'drain_seconds' not allowed"),
    ({"encoders": []}, "at '/encoders': minItems"),
    ({"encoders": None}, "missing property 'encoders'"),
    ({"encoders": {"a": "demo"}}, "at '/encoders': got object, want array"),
    ({"encoders": [{"name": "default", "spec": "demo"}]}, "at '/encoders/0/name'"),
    ({"encoders": [{"name": "Ä", "spec": "demo"}]}, "at '/encoders/0/name'"),
    ({"encoders": [{"name": "a", "spec": "demo"}, {"name": "a", "spec": "demo"}]}, 'encoder "a" is named twice'),
    ({"encoders": [{"name": "a", "spec": "ViT-B-32/openai"}]}, "need hub.enabled=true"),
    ({"encoders": [{"name": "a", "spec": "hf-hub:x/y"}]}, "need hub.enabled=true"),
    ({"defaultEncoder": "other"}, "is not among the encoders: demo, demo-robust"),
    ({"defences": {"other": "cola"}}, "is not among the encoders: demo, demo-robust"),
    ({"models.source": "pvc"}, "models.pvc.claimName"),
    ({"models.source": "init"}, "models.init.image and models.init.command"),
    ({"models.source": "image"}, "models.image.reference"),
    ({"models.source": "s3"}, "at '/models/source'"),
    ({"models.mountPath": "models"}, "at '/models/mountPath'"),
    ({"redis.mode": "external"}, "redis.existingSecret (with redis-url and redis-mac-key) or redis.url"),
    ({"redis.mode": "internal", "redis.url": "redis://h"}, "redis.url is for redis.mode=external"),
    ({"redis.mode": "external", "redis.url": "http://h"}, "at '/redis/url'"),
    ({"redis": {"mode": "external", "url": "rediss://u:p@h:6380/0", "port": 6379}}, "leave redis.port empty"),
    ({"redis": {"mode": "external", "url": "redis://h", "port": 6380}}, "redis.url is for port 6379"),
    ({"redis.port": "redis"}, "at '/redis/port'"),
    ({"redis.macKey": "short"}, "at '/redis/macKey'"),
    ({"metrics.port": 8000}, "is the service's own port"),
    ({"metrics": {"port": 0, "serviceMonitor": {"enabled": True}}, "keys.existingSecret": "k"}, "a port of its own"),
    ({"ingress.enabled": True}, "needs ingress.hosts"),
    ({"httpRoute.enabled": True}, "needs httpRoute.parentRefs"),
    ({"podDisruptionBudget.minAvailable": 1}, "would let no node be drained"),
    ({"podDisruptionBudget.minAvailable": "1%"}, "(1%) of 1 replicas would let no node be drained"),
    ({**FOUR, "podDisruptionBudget.minAvailable": 4}, "(4) of 4 replicas would let no node be drained"),
    ({**FOUR, "podDisruptionBudget.minAvailable": "100%"}, "(100%) of 4 replicas would let no node be drained"),
    ({**FOUR, "podDisruptionBudget.minAvailable": "76%"}, "(76%) of 4 replicas would let no node be drained"),
    ({"networkPolicy.internetExcept": ["fc00::/7"]}, "at '/networkPolicy/internetExcept/0'"),
    ({"networkPolicy.internetExceptIPv6": ["10.0.0.0/8"]}, "at '/networkPolicy/internetExceptIPv6/0'"),
    ({"strategy.rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}, "can replace no pod"),
    ({"extraEnv": [{"name": "IRONCLIP_DTYPE", "value": "float16"}]}, "extraEnv sets IRONCLIP_DTYPE"),
    ({"tmp.sizeLimit": "lots"}, "at '/tmp/sizeLimit'"),
    ({"drain.marginSeconds": 0}, "at '/drain/marginSeconds': minimum: got 0, want 5"),
    ({"serving.enabled": False}, "nothing to install"),
    ({"training": {"enabled": True, "nodes": 2}}, "ReadWriteMany"),
    ({"training": {"enabled": True, "gpusPerNode": 1, "processesPerNode": 2}}, "is more than training.gpusPerNode"),
    ({"training": {"enabled": True, "method": "pretrain", "processesPerNode": 2}}, "is one process"),
    ({"training.method": "simclr"}, "at '/training/method'"),
    ({"training.overrides": ["--steps"]}, "at '/training/overrides/0'"),
    ({"training.run": "../other"}, "at '/training/run'"),
    ({"redis": {"mode": "internal", "internal": {"maxmemory": "700mb"}}}, "needs a memory limit half as large again"),
    ({"settings.request_timeout_ms": 30001}, "drain.seconds (30) is less than the longest request"),
    ({"drain.seconds": 20}, "drain.seconds (20) is less than the longest request"),
    ({**ROUTE, "drain.seconds": 90, "settings.request_timeout_ms": 61000}, "the gateway would give up first"),
    ({**ROUTE, "httpRoute.requestTimeout": "29s999ms"}, "httpRoute.requestTimeout (29s999ms) is less than"),
    ({"service.nodePort": 30080}, "service.nodePort is for service.type=NodePort or LoadBalancer"),
    ({"service.externalTrafficPolicy": "Local"}, "service.externalTrafficPolicy is for service.type=NodePort or"),
    ({"service": {"type": "NodePort", "loadBalancerClass": "a/b"}}, "is for service.type=LoadBalancer"),
    ({"service.loadBalancerSourceRanges": ["203.0.113.1"]}, "at '/service/loadBalancerSourceRanges/0'"),
    ({"autoscaling.keda.authModes": "bearer"}, "needs autoscaling.keda.authenticationRef"),
    ({"autoscaling.keda.authModes": "token"}, "at '/autoscaling/keda/authModes'"),
    ({"autoscaling.keda.authenticationKind": "Secret"}, "at '/autoscaling/keda/authenticationKind'"),
    ({"networkPolicy.dnsPorts": []}, "at '/networkPolicy/dnsPorts': minItems"),
    ({"training.tmp.sizeLimit": "lots"}, "at '/training/tmp/sizeLimit'"),
]


@pytest.mark.parametrize(("values", "text"), REFUSED, ids=[f"{i}-{'+'.join(v)}" for i, (v, _) in enumerate(REFUSED)])
def test_bad_values_are_refused_with_a_reason(chart: Chart, values: dict[str, Any], text: str) -> None:
    said = chart.refusal(values)
    assert text in said
    assert "nil pointer" not in said


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"mode": "internal", "internal": {"maxmemory": "682mb"}}},
        {"redis": {"mode": "internal", "internal": {"maxmemory": "1gb", "resources": {"limits": {"memory": "1.5Gi"}}}}},
        {"redis": {"mode": "internal", "internal": {"maxmemory": "1000", "resources": {"limits": {"memory": 1500}}}}},
        {"settings.request_timeout_ms": 20000, "drain.seconds": 20},
        {**ROUTE, "httpRoute.requestTimeout": "30s"},
        {**ROUTE, "drain.seconds": 90, "settings.request_timeout_ms": 90000, "httpRoute.requestTimeout": "1m30s"},
        {**ROUTE, "httpRoute.requestTimeout": "0s"},
    ],
    ids=str,
)
def test_values_at_the_border_are_accepted(chart: Chart, values: dict[str, Any]) -> None:
    chart.render(values)


def test_the_longest_request_is_the_services_own(chart: Chart) -> None:
    """The chart holds the drain to a default that stands in the service's settings."""
    default = Settings.model_fields["request_timeout_ms"].default
    assert yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["drain"]["seconds"] * 1000 == default
    assert f"request_timeout_ms, {default})" in chart.refusal({"drain.seconds": (default - 1) / 1000})


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*path, key))]
    return [path]


def test_every_value_is_documented() -> None:
    documented = {tuple(path.split(".")) for path in documents.documented_values()}
    # Where a comment stands over a whole map of Kubernetes' own, it speaks for what is in it.
    whole = {"strategy", "resources", "podSecurityContext", "containerSecurityContext", "probes", "behavior", "labels"}
    whole |= {"annotations", "ingressFrom", "metricsFrom", "dnsTo"}
    for leaf in _leaves(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))):
        over = [leaf[:length] for length in range(1, len(leaf) + 1) if leaf[:length] in documented]
        assert over, f"{'.'.join(leaf)} has no comment"
        assert over[-1] == leaf or whole & set(leaf[: len(over[-1])]), f"{'.'.join(leaf)} has no comment of its own"


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def compare(values: dict[str, Any], rules: dict[str, Any], path: str) -> None:
        optional = {"global", "successThreshold", "claims"}
        assert set(values) <= set(rules["properties"]), path
        assert set(rules["properties"]) - set(values) <= optional, path
        for key, value in values.items():
            rule = rules["properties"][key]
            if isinstance(value, dict) and rule.get("properties") and value and key not in ("resources",):
                compare(value, rule, f"{path}.{key}")

    schema["properties"]["settings"] = {"type": "object"}
    compare(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), schema, "")


def test_the_schema_has_the_services_current_settings() -> None:
    text = (CHART / "values.schema.json").read_text(encoding="utf-8")
    assert text == documents.schema_text(), "run `make readme`"


def test_the_readme_has_the_current_values() -> None:
    command = [sys.executable, "-m", "cogapp", "--check", "k8s/ironclip/README.md"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"run `make readme`\n{result.stdout}{result.stderr}"


def test_the_readmes_commands_are_accepted_by_helm(chart: Chart) -> None:
    """Each `helm upgrade --install` of the README, as `helm template` of the same values."""
    text = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    commands = [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "helm upgrade --install" in line
    ]
    assert len(commands) >= 4
    installed: set[str] = set()
    for command in commands:
        arguments = command.split("#")[0].split()[3:]
        assert arguments[1] == "k8s/ironclip", command
        # An upgrade by --set alone would take away what the page gave the release before: its keys, its Redis.
        assert arguments[0] not in installed or {"-f", "--reset-then-reuse-values"} & set(arguments), command
        installed.add(arguments[0])
        kept = [a for a in arguments if a not in ("--create-namespace", "--wait", "--reset-then-reuse-values")]
        result = chart.run("template", *kept)
        assert result.returncode == 0, f"{command}\n{result.stderr}"


def test_the_readmes_manifests_are_valid() -> None:
    text = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")
    applied = re.findall(r"kubectl apply -f - <<END[^\n]*\n(.*?)^END$", text, flags=re.MULTILINE | re.DOTALL)
    assert applied
    for manifest in applied:
        kubernetes_validate.validate(yaml.safe_load(manifest), "1.34", strict=True)
    files = re.findall(r"(?:apply|-f) -?f? ?([\w./-]+\.yaml)", text)
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_versions_are_the_projects() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{about["appVersion"]}"' in project


def test_notes_tell_what_is_missing(chart: Chart) -> None:
    """NOTES.txt is rendered by an install alone; --dry-run=client needs no cluster."""
    arguments = ["install", "rel", str(CHART), "--dry-run=client"]
    open_to_all = chart.run(*arguments)
    assert open_to_all.returncode == 0, open_to_all.stderr
    assert "there are no API keys" in open_to_all.stdout
    closed = chart.run(*arguments, "--values", str(CHART / "ci" / "production-values.yaml"))
    assert "there are no API keys" not in closed.stdout
    assert "clip.example.com" in closed.stdout.partition("NOTES:")[2]
    default = chart.run(*arguments, "--set", "service.type=LoadBalancer").stdout
    assert "the Service is a LoadBalancer" in default
    named = ["--set-json", 'networkPolicy.ingressFrom=[{"ipBlock": {"cidr": "203.0.113.0/24"}}]']
    assert "the Service is a" not in chart.run(*arguments, "--set", "service.type=LoadBalancer", *named).stdout
    assert "the Service is a" not in open_to_all.stdout
    assert "KEDA asks Prometheus" not in closed.stdout
    unwatched = [
        "--values",
        str(CHART / "ci" / "production-values.yaml"),
        "--set",
        "metrics.serviceMonitor.enabled=false",
    ]
    assert 'service="rel-ironclip-metrics"' in chart.run(*arguments, *unwatched).stdout.partition("NOTES:")[2]


def test_the_service_can_be_reached_from_outside(chart: Chart) -> None:
    given: dict[str, Any] = {
        "type": "LoadBalancer",
        "nodePort": 30080,
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "loadBalancerClass": "example.com/internal",
    }
    manifests = chart.render({f"service.{key}": value for key, value in given.items()})
    service = only(manifests, "Service", "rel-ironclip")
    kubernetes_validate.validate(service, "1.34", strict=True)
    (port,) = service["spec"]["ports"]
    assert port["nodePort"] == given.pop("nodePort")
    assert given.items() <= service["spec"].items()
    assert set(only(chart.render(), "Service", "rel-ironclip")["spec"]) == {"type", "selector", "ports"}
