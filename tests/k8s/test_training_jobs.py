"""Training jobs: a command that the trainer understands, a run that goes on, failures that are told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.conftest import ROOT, Chart, Manifest, ci_file, only, pod_specs
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


def test_an_eviction_is_no_failure_and_a_bad_command_line_is_final(chart: Chart) -> None:
    job = only(chart.render(files=[ci_file("train-one")]), "Job")["spec"]
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"  # never two writers of one checkpoint
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    # The status that the rule waits for is the one that the trainer has for it, and no other fault shares it.
    bad = subprocess.run([sys.executable, "-m", "training", "nonsense"], cwd=ROOT, capture_output=True)
    assert [bad.returncode] == fail["onExitCodes"]["values"]


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


def test_runs_stay_when_the_release_goes(chart: Chart) -> None:
    manifests = chart.render(files=[ci_file("train-one")])
    claim = only(manifests, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    volumes = only(manifests, "Job")["spec"]["template"]["spec"]["volumes"]
    (runs,) = [volume for volume in volumes if volume["name"] == "runs"]
    assert runs["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert not [m for m in manifests if m["kind"] in ("Deployment", "Service", "ConfigMap")]
