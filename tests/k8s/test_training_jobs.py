"""Training jobs: a command that the trainer understands, a run that goes on, failures that are told apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.conftest import CHART, ROOT, Chart, Manifest, ci_file, only, pod_specs
from training.__main__ import _parser as trainer_parser

TRAINING = [ci_file(name) for name in ("train-one", "train-many", "serve-and-train")]


def _container(manifests: list[Manifest]) -> Manifest:
    templates = [t for name, t in pod_specs(manifests).items() if name.startswith(("Job/", "TrainingRuntime/"))]
    (template,) = templates
    (container,) = template["spec"]["containers"]
    found: Manifest = container
    return found


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem.removesuffix("-values"))
def test_the_trainer_understands_the_command(chart: Chart, file: Path) -> None:
    manifests = chart.render(files=[file])
    container = _container(manifests)
    command = container["command"]
    assert command[:2] == ["python", "-m"]
    arguments = trainer_parser().parse_args(command[command.index("training") + 1 :])
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    # What is written lies in the claim, what is read in the other.
    assert str(arguments.run.parent) in mounts
    assert not mounts[str(arguments.run.parent)].get("readOnly")
    assert mounts["/data"]["readOnly"] is True
    assert any(override.startswith("data.path=/data/") for override in arguments.overrides)
    folder = ROOT / "training" / "configs" / ("pretrain" if arguments.command == "pretrain" else "robust")
    assert (folder / f"{arguments.config}.toml").is_file()


def test_torchrun_accepts_its_part(chart: Chart) -> None:
    """torchrun reads the command up to the module; what comes after is the trainer's."""
    from torch.distributed.run import get_args_parser

    for file, nodes in ((ci_file("train-one"), "1:1"), (ci_file("train-many"), "1:1")):
        command = _container(chart.render(files=[file]))["command"]
        assert command[2] == "torch.distributed.run"
        parsed = get_args_parser().parse_args(command[3:])
        assert (parsed.module, parsed.training_script, parsed.nnodes) == (True, "training", nodes)
        assert parsed.training_script_args[0] in ("fare", "tecoa")
    one = get_args_parser().parse_args(_container(chart.render(files=[ci_file("train-one")]))["command"][3:])
    assert (one.standalone, one.nproc_per_node) == (True, "8")


def test_several_nodes_are_told_apart_by_the_operators_variables(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    # What Kubeflow Trainer puts into the container called `node`.
    given = {
        "NNODES": "4",
        "NPROC_PER_NODE": "8",
        "NODE_RANK": "3",
        "MASTER_ADDR": "x-node-0-0.x",
        "MASTER_PORT": "29400",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"PET_{name}", value)
    manifests = chart.render(files=[ci_file("train-many")])
    container = _container(manifests)
    assert container["name"] == "node"
    parsed = get_args_parser().parse_args(container["command"][3:])
    assert (parsed.nnodes, parsed.nproc_per_node, str(parsed.node_rank)) == ("4", "8", "3")
    assert (parsed.master_addr, str(parsed.master_port)) == ("x-node-0-0.x", "29400")
    job, runtime = only(manifests, "TrainJob"), only(manifests, "TrainingRuntime")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (4, 8)
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert only(manifests, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_runtime_is_there_before_its_job(chart: Chart) -> None:
    """As helm itself would apply them: hooks first, then the manifest from its top."""
    arguments = ["install", "rel", str(CHART), "--dry-run=client", "-o", "json", "-f", str(ci_file("train-many"))]
    release = json.loads(chart.run(*arguments).stdout)
    (hook,) = release["hooks"]
    assert (hook["kind"], sorted(hook["events"])) == ("TrainingRuntime", ["pre-install", "pre-upgrade"])
    applied = [document["kind"] for document in yaml.safe_load_all(release["manifest"]) if document]
    assert applied.index("PersistentVolumeClaim") < applied.index("TrainJob")
    assert "TrainingRuntime" not in applied


def test_torchrun_gives_the_time_that_the_pod_has(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own 30 seconds do not do for a checkpoint of a large model."""
    from torch.distributed.launcher.api import LaunchConfig

    for file in (ci_file("train-one"), ci_file("train-many")):
        manifests = chart.render({"training.terminationGracePeriodSeconds": 100}, files=[file])
        for variable in _container(manifests)["env"]:
            if "value" in variable:
                monkeypatch.setenv(variable["name"], variable["value"])
        assert LaunchConfig(1, 1, 1).shutdown_timeout == 85
    names = {variable["name"] for variable in _container(chart.render(files=[ci_file("serve-and-train")]))["env"]}
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in names
    short = _container(chart.render({"training.terminationGracePeriodSeconds": 5}, files=[ci_file("train-one")]))
    assert {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "1"} in short["env"]


def test_an_eviction_is_no_failure_and_a_bad_command_line_is_final(chart: Chart) -> None:
    job = only(chart.render(files=[ci_file("serve-and-train")]), "Job")["spec"]
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"  # never two writers of one checkpoint
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    # The status that the rule waits for is the one that the trainer has for it, and no other fault shares it.
    bad = subprocess.run([sys.executable, "-m", "training", "nonsense"], cwd=ROOT, capture_output=True)
    assert [bad.returncode] == fail["onExitCodes"]["values"]
    # torchrun ends with 1 whatever its processes end with: a rule for 2 would promise what does not come.
    several = only(chart.render(files=[ci_file("train-one")]), "Job")["spec"]
    assert several["podFailurePolicy"]["rules"] == [ignore]


def test_other_values_make_another_job_in_the_same_folder(chart: Chart) -> None:
    def job(values: dict[str, Any]) -> Manifest:
        return only(chart.render(values, files=[ci_file("train-one")]), "Job")

    first, again = job({}), job({})
    assert first == again
    changed = job({"training.overrides": ["checkpoint_every=100"]})
    # A Job's pods cannot be changed: an upgrade of the same name would be refused.
    assert changed["metadata"]["name"] != first["metadata"]["name"]
    commands = [one["spec"]["template"]["spec"]["containers"][0]["command"] for one in (first, changed)]
    assert commands[0][commands[0].index("--folder") + 1] == commands[1][commands[1].index("--folder") + 1]
    assert len(changed["metadata"]["name"]) <= 63


def test_a_new_chart_starts_no_second_job_nor_restarts_redis(chart: Chart, tmp_path: Path) -> None:
    newer = tmp_path / "ironclip"
    shutil.copytree(CHART, newer)
    about = (newer / "Chart.yaml").read_text(encoding="utf-8")
    (newer / "Chart.yaml").write_text(about.replace("0.1.0", "0.2.0"), encoding="utf-8")
    for file in (ci_file("serve-and-train"), ci_file("train-many")):
        values = ["--values", str(file), "--set-string", "training.image.tag=7"]
        before, after = (
            [m for m in yaml.safe_load_all(chart.run("template", "rel", str(folder), *values).stdout) if m]
            for folder in (CHART, newer)
        )
        versions = {m["metadata"]["labels"]["helm.sh/chart"] for m in after}
        assert versions == {"ironclip-0.2.0"}
        kept = [m for m in before if m["kind"] in ("Job", "TrainJob", "TrainingRuntime", "StatefulSet")]
        for manifest in kept:
            again = only(after, manifest["kind"], manifest["metadata"]["name"])
            assert again["spec"] == manifest["spec"]
        # What the owner's labels say of whose it all is does not make another job either.
        labelled = chart.render({"commonLabels": {"team": "vision"}, "training.image.tag": "7"}, files=[file])
        kind = "TrainJob" if file == ci_file("train-many") else "Job"
        assert only(labelled, kind)["metadata"]["name"] == only(before, kind)["metadata"]["name"]
        assert len(kept) == 2


def test_training_pods_take_what_is_given_besides(chart: Chart) -> None:
    extra = {
        "gpu.runtimeClassName": "nvidia",
        "training.tmp.sizeLimit": "3Gi",
        "training.podLabels": {"team": "vision"},
        "training.extraEnvFrom": [{"secretRef": {"name": "tracker"}}],
        "training.extraVolumes": [{"name": "configs", "configMap": {"name": "configs"}}],
        "training.extraVolumeMounts": [{"name": "configs", "mountPath": "/configs", "readOnly": True}],
        "training.extraEgress": [{"ports": [{"port": 5000, "protocol": "TCP"}]}],
    }
    for file in (ci_file("train-one"), ci_file("train-many")):
        manifests = chart.render(extra, files=[file])
        (template,) = pod_specs(manifests).values()
        pod, container = template["spec"], _container(manifests)
        assert template["metadata"]["labels"]["team"] == "vision"
        assert pod["runtimeClassName"] == "nvidia"
        assert {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "3Gi"}} in pod["volumes"]
        assert extra["training.extraVolumes"][0] in pod["volumes"]
        assert extra["training.extraVolumeMounts"][0] in container["volumeMounts"]
        assert container["envFrom"] == extra["training.extraEnvFrom"]
        assert only(manifests, "NetworkPolicy")["spec"]["egress"][-1] == extra["training.extraEgress"][0]
    on_cpu = chart.render(extra, files=[ci_file("serve-and-train")])
    assert "runtimeClassName" not in only(on_cpu, "Job")["spec"]["template"]["spec"]


def test_runs_stay_when_the_release_goes(chart: Chart) -> None:
    manifests = chart.render(files=[ci_file("train-one")])
    claim = only(manifests, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    volumes = only(manifests, "Job")["spec"]["template"]["spec"]["volumes"]
    (runs,) = [volume for volume in volumes if volume["name"] == "runs"]
    assert runs["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert not [m for m in manifests if m["kind"] in ("Deployment", "Service", "ConfigMap")]
