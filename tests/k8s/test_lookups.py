"""What the chart reads back from a cluster: the real helm asks an API server that answers what these tests say."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from tests.k8s.conftest import CHART, NAMESPACE, Chart, Manifest, ci_file, only

# Group and version -> kind -> plural; all that the values of these tests render, and no other.
KINDS = {
    "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
    "trainer.kubeflow.org/v1alpha1": ["TrainJob", "TrainingRuntime"],
}


def _plural(kind: str) -> str:
    return kind.lower().removesuffix("y") + "ies" if kind.endswith("y") else kind.lower() + "s"


def _path(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _discovery() -> dict[str, Any]:
    """What an API server tells of its kinds, by path."""
    groups = []
    answers: dict[str, Any] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
    }
    for version, kinds in KINDS.items():
        resources = [{"name": _plural(kind), "kind": kind, "namespaced": True, "verbs": ["get"]} for kind in kinds]
        answers[_path(version)] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        if "/" in version:
            group, _, part = version.partition("/")
            named = {"groupVersion": version, "version": part}
            groups.append({"name": group, "versions": [named], "preferredVersion": named})
    answers["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return answers


class Cluster:
    """An API server that has some objects, and the chart as helm would install it there."""

    def __init__(self, chart: Chart, url: str, answers: dict[str, Any]) -> None:
        self._chart, self._url, self._answers = chart, url, answers

    def add(self, manifest: Manifest) -> None:
        """Put an object there as helm does: with the names by which a release knows its own again."""
        owner = {"meta.helm.sh/release-name": "rel", "meta.helm.sh/release-namespace": NAMESPACE}
        about = {**manifest["metadata"], "annotations": manifest["metadata"].get("annotations", {}) | owner}
        manifest = {**manifest, "metadata": about}
        folder = f"{_path(manifest['apiVersion'])}/namespaces/{NAMESPACE}/{_plural(manifest['kind'])}"
        self._answers[f"{folder}/{manifest['metadata']['name']}"] = manifest

    def render(self, *arguments: str) -> list[Manifest]:
        """The manifests, with everything that the chart looks up looked up."""
        asked = ("--dry-run=server", "--kube-apiserver", self._url, "--disable-openapi-validation")
        result = self._chart.run("template", "rel", str(CHART), "--namespace", NAMESPACE, *asked, *arguments)
        assert result.returncode == 0, result.stderr
        return [document for document in yaml.safe_load_all(result.stdout) if document]


@pytest.fixture
def cluster(chart: Chart) -> Iterator[Cluster]:
    answers = _discovery()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Cluster(chart, f"http://127.0.0.1:{server.server_address[1]}", answers)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _secret(manifests: list[Manifest]) -> dict[str, str]:
    secret = only(manifests, "Secret", "-redis")
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def test_what_was_drawn_stays_and_is_taken_up_again(cluster: Cluster) -> None:
    """Redis' claim outlives the release: with another key its label sets could not be used, nor it be reached."""
    values = ("--set", "redis.mode=internal")
    first, other = (cluster.render(*values) for _ in range(2))
    assert _secret(first)["redis-mac-key"] != _secret(other)["redis-mac-key"]
    secret = only(first, "Secret", "-redis")
    assert secret["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    cluster.add(secret)
    assert _secret(cluster.render(*values)) == _secret(first)


def test_the_runtime_of_a_job_that_runs_is_left_alone(cluster: Cluster) -> None:
    """A hook that is applied again is deleted first, which the operator holds up while a TrainJob uses the runtime."""
    values = ("--values", str(ci_file("train-many")))
    runtime = only(cluster.render(*values), "TrainingRuntime")
    cluster.add(runtime)
    again = cluster.render(*values)
    assert only(again, "TrainJob")["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert not [manifest for manifest in again if manifest["kind"] == "TrainingRuntime"]
    changed = cluster.render(*values, "--set", "training.backoffLimit=1")
    assert only(changed, "TrainingRuntime")["metadata"]["name"] == only(changed, "TrainJob")["metadata"]["name"]
