"""Every example renders to manifests that Kubernetes of several versions, and the operators' own schemas, accept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import pytest
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob

from tests.k8s.conftest import CHART, CI_FILES, NAMESPACE, Chart, Manifest, ci_file, only, pod_specs

# The package would read its megabytes of schemas anew for each manifest.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
# All examples for the oldest and the newest, and those with most kinds for what lies between.
VERSIONS = dict.fromkeys(("1.27", "1.37"), CI_FILES) | {
    version: [ci_file("production"), ci_file("serve-and-train")] for version in ("1.30", "1.34")
}
OPERATORS: dict[tuple[str, str], Any] = {
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRule,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): TrainerV1alpha1TrainJob,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): TrainerV1alpha1TrainingRuntime,
}


def _lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """What stands in `given` and not in `kept`: fields that a model does not know."""
    if isinstance(given, dict):
        kept = kept if isinstance(kept, dict) else {}
        return [
            fault
            for key, value in given.items()
            for fault in (_lost(value, kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        pairs = zip(given, kept, strict=True)
        return [fault for i, (a, b) in enumerate(pairs) for fault in _lost(a, b, f"{path}[{i}]")]
    return []


def _without_quantities(value: Any) -> Any:
    """The same without resources and sizes: these models have no form for a quantity."""
    if isinstance(value, dict):
        return {k: _without_quantities(v) for k, v in value.items() if k not in ("resources", "sizeLimit")}
    return [_without_quantities(entry) for entry in value] if isinstance(value, list) else value


def _check_operators(manifest: Manifest, version: str) -> None:
    model = OPERATORS[manifest["apiVersion"], manifest["kind"]]
    if manifest["kind"] == "TrainingRuntime":
        (template,) = pod_specs([manifest]).values()
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "node"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
        manifest = _without_quantities(manifest)
    # Pydantic reads the types; what it does not know it drops, so what was dropped is looked for.
    parsed = model.model_validate(manifest)
    assert not _lost(manifest, parsed.model_dump(by_alias=True, mode="json"))


def _check_route(manifest: Manifest) -> None:
    """HTTPRoute of gateway.networking.k8s.io/v1: no package carries its schema."""
    spec = manifest["spec"]
    assert set(spec) <= {"parentRefs", "hostnames", "rules"}
    for parent in spec["parentRefs"]:
        assert set(parent) <= {"group", "kind", "namespace", "name", "sectionName", "port"}
    for rule in spec["rules"]:
        assert set(rule) <= {"matches", "filters", "backendRefs", "timeouts"}
        assert all(match["path"]["type"] in ("PathPrefix", "Exact", "RegularExpression") for match in rule["matches"])
        assert all(isinstance(backend["port"], int) and backend["name"] for backend in rule["backendRefs"])


def check(manifest: Manifest, version: str) -> None:
    """Fail where this version of Kubernetes or the operator would refuse the manifest."""
    key = (manifest["apiVersion"], manifest["kind"])
    if key in OPERATORS:
        _check_operators(manifest, version)
    elif key == ("gateway.networking.k8s.io/v1", "HTTPRoute"):
        _check_route(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_lint_has_nothing_to_say(chart: Chart) -> None:
    values = [argument for file in CI_FILES for argument in ("--values", str(file))]
    assert len(CI_FILES) >= 9
    for arguments in ([], values[:2], values[6:8]):
        result = chart.run("lint", "--strict", str(CHART), *arguments)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "version"),
    [(file, version) for version, files in VERSIONS.items() for file in files],
    ids=lambda part: part.stem.removesuffix("-values") if isinstance(part, Path) else part,
)
def test_manifests_are_valid(chart: Chart, file: Path, version: str) -> None:
    if file == ci_file("oci-image") and version < "1.33":
        result = chart.template(files=[file], kube=version)
        assert "Kubernetes 1.33" in result.stderr
        return
    manifests = chart.render(files=[file], kube=version)
    assert manifests
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))
    for manifest in manifests:
        check(manifest, version)


def test_the_checks_do_find_faults(chart: Chart) -> None:
    manifests = chart.render(files=[ci_file("production")]) + chart.render(files=[ci_file("train-many")])
    deployment, scaled = only(manifests, "Deployment"), only(manifests, "ScaledObject")
    deployment = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    scaled = {**scaled, "spec": {**scaled["spec"], "minReplicas": 1}}
    job = only(manifests, "TrainJob")
    job = {**job, "spec": {**job["spec"], "numNodes": 3}}
    for broken in (deployment, scaled, job):
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check(broken, "1.34")


@pytest.mark.parametrize("file", CI_FILES, ids=lambda file: file.stem.removesuffix("-values"))
def test_pods_meet_the_restricted_standard(chart: Chart, file: Path) -> None:
    """What Kubernetes' Pod Security Standard `restricted` asks for, and a read-only root and no token besides."""
    pods = pod_specs(chart.render(files=[file]))
    assert pods
    for name, template in pods.items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name


@pytest.mark.parametrize("file", CI_FILES, ids=lambda file: file.stem.removesuffix("-values"))
def test_what_selects_finds_what_it_means(chart: Chart, file: Path) -> None:
    """Services, budgets, policies and monitors select exactly one kind of pod (or Service), by its labels."""
    manifests = chart.render(files=[file])
    labels = {name: template["metadata"]["labels"] for name, template in pod_specs(manifests).items()}
    services = {
        f"Service/{m['metadata']['name']}": m["metadata"]["labels"] for m in manifests if m["kind"] == "Service"
    }
    selectors: list[tuple[str, dict[str, str], dict[str, dict[str, str]]]] = []
    for manifest in manifests:
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        if kind == "Service":
            selectors.append((kind, spec["selector"], labels))
        elif kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            selectors.append((kind, spec["selector"]["matchLabels"], labels))
        elif kind == "NetworkPolicy":
            selectors.append((kind, spec["podSelector"]["matchLabels"], labels))
        elif kind == "ServiceMonitor":
            selectors.append((kind, spec["selector"]["matchLabels"], services))
            assert spec["namespaceSelector"] == {"matchNames": [NAMESPACE]}
    for kind, selector, candidates in selectors:
        found = [name for name, have in candidates.items() if selector.items() <= have.items()]
        assert len(found) == 1, (kind, selector, found)


@pytest.mark.parametrize("file", CI_FILES, ids=lambda file: file.stem.removesuffix("-values"))
def test_ports_agree(chart: Chart, file: Path) -> None:
    """Whatever names a port names one that the pods behind it have."""
    manifests = chart.render(files=[file])
    pods = pod_specs(manifests)
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") if manifest["kind"] == "Service" else spec.get("podSelector", {})
        if manifest["kind"] not in ("Service", "NetworkPolicy"):
            continue
        wanted = (selector or {}).get("matchLabels", selector) or {}
        (template,) = [t for t in pods.values() if wanted.items() <= t["metadata"]["labels"].items()]
        names = {port["name"] for c in template["spec"]["containers"] for port in c.get("ports", [])}
        if manifest["kind"] == "Service":
            used = {port["targetPort"] for port in spec["ports"]}
        else:
            used = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])}
        assert used <= names, (manifest["metadata"]["name"], used, names)
    routes = [m for m in manifests if m["kind"] in ("Ingress", "HTTPRoute")]
    for route in routes:
        service = only([m for m in manifests if m["kind"] == "Service"], "Service", route["metadata"]["name"])
        (port,) = service["spec"]["ports"]
        if route["kind"] == "HTTPRoute":
            assert route["spec"]["rules"][0]["backendRefs"] == [
                {"name": service["metadata"]["name"], "port": port["port"]}
            ]
        else:
            backend = route["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
            assert backend == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
