"""The service's pod: an environment that the service accepts, secrets where they belong, an end that is waited for."""

from __future__ import annotations

import base64
import math
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.settings import PREFIX, Settings, load_settings
from tests.k8s.conftest import CI_FILES, Chart, Manifest, ci_file, only, pod_specs

SERVING = [file for file in CI_FILES if not file.stem.startswith("train-")]
# What a coming release of the service reads; as soon as Settings has them they are held to it like the rest.
AWAITED = {"metrics_port", "keys_file"} - set(Settings.model_fields)


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """What the service's container would find in its environment, with secrets and resources filled in."""
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= only(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    given = {"redis-url": "redis://ironclip:secret@redis:6379/0", "redis-mac-key": "m" * 48, "HF_TOKEN": "t"}
    for secret in manifests:
        if secret["kind"] == "Secret":
            given |= {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    for variable in container.get("env", []):
        source = variable.get("valueFrom", {})
        if "secretKeyRef" in source:
            found[variable["name"]] = given[source["secretKeyRef"]["key"]]
        elif "resourceFieldRef" in source:
            part, name = source["resourceFieldRef"]["resource"].split(".")
            text = str(container["resources"][part][name])
            cores = float(text[:-1]) / 1000 if text.endswith("m") else float(text)
            found[variable["name"]] = str(math.ceil(cores / float(source["resourceFieldRef"]["divisor"])))
        else:
            found[variable["name"]] = variable["value"]
    return found


def settings_of(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's own settings, read by itself from that environment."""
    import os

    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    for name, value in environment(manifests).items():
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() not in AWAITED:
            monkeypatch.setenv(name, value)
    return load_settings()


@pytest.mark.parametrize("file", SERVING, ids=lambda file: file.stem.removesuffix("-values"))
def test_the_service_reads_its_environment(chart: Chart, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = chart.render(files=[file])
    settings = settings_of(manifests, monkeypatch)
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.host == "0.0.0.0"
    assert settings.port == ports["http"]
    assert environment(manifests).get("IRONCLIP_METRICS_PORT") == (
        str(ports["metrics"]) if "metrics" in ports else None
    )
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert str(settings.state_dir) in mounts
    for spec in settings.encoders.values():
        if spec.startswith("/"):
            assert any(spec.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])


def test_values_become_settings(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = settings_of(chart.render(files=[ci_file("gpu")]), monkeypatch)
    # The order is that of the list: an object that sorts its keys would change which encoder comes first.
    assert list(gpu.encoders.items()) == [
        ("clip", "ViT-L-14/openai"),
        ("robust", "hf-hub:chs20/FARE4-ViT-B-32-laion2B-s34B-b79K"),
    ]
    assert (gpu.default_name, gpu.defences, gpu.device, gpu.dtype) == ("robust", {"clip": "cola"}, "cuda", "bfloat16")
    assert (gpu.threads, gpu.decode_workers) == (8, 8)
    # Large numbers reach helm as floats, and must not come out as 3.3554432e+07.
    values: dict[str, Any] = {
        "settings": {"cache_bytes": 1073741824, "probes": False, "idle_wait_ms": 2.5, "threads": 3}
    }
    chosen = settings_of(chart.render(values), monkeypatch)
    assert (chosen.cache_bytes, chosen.probes, chosen.idle_wait_ms) == (1073741824, False, 2.5)
    # Two cores are requested; one number of the two was given.
    assert (chosen.threads, chosen.decode_workers) == (3, 2)


def test_half_a_core_is_one_thread(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(chart.render(files=[ci_file("laptop")]), monkeypatch).threads == 1


def test_the_pod_is_given_the_time_that_its_drain_takes(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, expected in (("default", 55), ("production", 61)):
        manifests = chart.render(files=[ci_file(file)])
        settings = settings_of(manifests, monkeypatch)
        grace = only(manifests, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace == expected
        assert grace >= settings.drain_delay_seconds + settings.drain_seconds + 5
        assert settings.drain_seconds * 1000 >= settings.request_timeout_ms


def test_a_slow_start_is_no_failed_rollout(chart: Chart) -> None:
    spec = only(chart.render(), "Deployment")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert spec["progressDeadlineSeconds"] > startup["periodSeconds"] * startup["failureThreshold"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def _annotations(manifests: list[Manifest]) -> dict[str, str]:
    found: dict[str, str] = only(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    return found


def test_changed_settings_roll_pods_and_changed_keys_do_not(chart: Chart) -> None:
    base = {"keys.file": "[[keys]]\n"}
    before = _annotations(chart.render(base))
    assert _annotations(chart.render(base)) == before
    assert _annotations(chart.render({**base, "settings.max_batch": 8})) != before
    renewed = chart.render({"keys.file": "[[keys]]\nid = 'other'\n"})
    assert _annotations(renewed) == before
    # A file mounted by subPath would never change in a running pod.
    (container,) = only(renewed, "Deployment")["spec"]["template"]["spec"]["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "keys"]
    assert "subPath" not in mount
    assert environment(renewed)["IRONCLIP_KEYS_FILE"] == f"{mount['mountPath']}/keys.toml"
    secret = only(renewed, "Secret", "-keys")
    assert base64.b64decode(secret["data"]["keys.toml"]).decode() == "[[keys]]\nid = 'other'\n"


def test_a_new_redis_url_rolls_pods_and_a_random_password_does_not(chart: Chart) -> None:
    external = {"redis.mode": "external", "redis.url": "redis://a"}
    assert _annotations(chart.render(external)) != _annotations(chart.render({**external, "redis.url": "redis://b"}))
    # Without a cluster the password is drawn anew each time; in one it is read back. Neither may restart pods.
    first, second = (Chart(chart.helm).render({"redis.mode": "internal"}) for _ in range(2))
    passwords = [only(one, "Secret", "-redis")["data"]["redis-password"] for one in (first, second)]
    assert passwords[0] != passwords[1]
    assert _annotations(first) == _annotations(second)


@pytest.mark.parametrize("file", CI_FILES, ids=lambda file: file.stem.removesuffix("-values"))
def test_secrets_stay_in_secrets(chart: Chart, file: Path) -> None:
    manifests = chart.render(files=[file])
    secrets = [
        base64.b64decode(value).decode()
        for manifest in manifests
        if manifest["kind"] == "Secret"
        for value in manifest["data"].values()
    ]
    if file in (ci_file("production"), ci_file("gateway-hpa")):
        assert secrets
    for manifest in manifests:
        if manifest["kind"] != "Secret":
            assert not [secret for secret in secrets if secret in str(manifest)], manifest["metadata"]["name"]
        if manifest["kind"] == "ConfigMap":
            assert not {"IRONCLIP_REDIS_URL", "IRONCLIP_REDIS_MAC_KEY", "HF_TOKEN"} & set(manifest["data"])


def test_the_budget_lets_nodes_be_drained(chart: Chart) -> None:
    for file in SERVING:
        manifests = chart.render(files=[file])
        budgets = [m["spec"] for m in manifests if m["kind"] == "PodDisruptionBudget"]
        scalers = [m["spec"] for m in manifests if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
        replicas = only(manifests, "Deployment")["spec"].get("replicas")
        # Where something scales, a number of replicas in the Deployment would fight with it at each upgrade.
        assert (replicas is None) == bool(scalers), file
        least = replicas or scalers[0].get("minReplicas") or scalers[0]["minReplicaCount"]
        for budget in budgets:
            assert least - budget.get("minAvailable", 0) >= 1, file
            assert budget.get("maxUnavailable", 1) >= 1, file
    # Kubernetes rounds up: 75 % of four are three, and one may go.
    share = {"replicaCount": 4, "redis.mode": "internal", "podDisruptionBudget.minAvailable": "75%"}
    assert only(chart.render(share), "PodDisruptionBudget")["spec"]["minAvailable"] == "75%"


def test_a_gpu_is_asked_for_once_and_tolerated(chart: Chart) -> None:
    pod = only(chart.render(files=[ci_file("gpu")]), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "12Gi", "nvidia.com/gpu": 1}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["runtimeClassName"] == "nvidia"
    plain = only(chart.render(), "Deployment")["spec"]["template"]["spec"]
    assert "tolerations" not in plain
    assert set(plain["containers"][0]["resources"]["limits"]) == {"memory"}


def test_nodes_whose_gpus_are_cut_up_are_tolerated(chart: Chart) -> None:
    """A node is tainted for its GPUs as a whole, whatever its plugin calls their parts."""
    given = {"gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb"}}
    training = {"training": {"enabled": True, "gpusPerNode": 1, "gpuResource": "nvidia.com/mig-1g.10gb"}}
    manifests = chart.render({**given, **training})
    for kind in ("Deployment", "Job"):
        pod = only(manifests, kind)["spec"]["template"]["spec"]
        assert [taint["key"] for taint in pod["tolerations"]] == ["nvidia.com/mig-1g.10gb", "nvidia.com/gpu"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    other = only(chart.render({"gpu": {"enabled": True, "resource": "amd.com/gpu"}}), "Deployment")
    assert [taint["key"] for taint in other["spec"]["template"]["spec"]["tolerations"]] == ["amd.com/gpu"]


def test_disk_is_asked_for_where_it_is_filled(chart: Chart) -> None:
    def asked(values: dict[str, Any], name: str = "default") -> str | None:
        pod = only(chart.render(values, files=[ci_file(name)]), "Deployment")["spec"]["template"]["spec"]
        found: str | None = pod["containers"][0]["resources"]["requests"].get("ephemeral-storage")
        return found

    assert asked({}) is None
    assert asked({}, "gpu") is None  # a claim keeps what is fetched
    assert asked({"hub.enabled": True, "hub.sizeLimit": "20Gi"}) == str(20 << 30)
    assert asked({}, "gateway-hpa") == str(10 << 30)
    assert asked({"hub.enabled": True, "hub.sizeLimit": "512Mi"}, "gateway-hpa") == str((10 << 30) + (512 << 20))
    assert asked({"resources.requests.ephemeral-storage": "1Gi"}, "gateway-hpa") == "1Gi"


def test_the_default_may_be_an_encoder_of_the_folder(
    chart: Chart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in models_dir is found out at start, and may change afterwards."""
    values = {
        "settings.models_dir": str(tmp_path),
        "defaultEncoder": "robust",
        "defences": {"robust": "cola"},
    }
    settings = settings_of(chart.render(values), monkeypatch)
    assert (settings.default_name, settings.defences, settings.models_dir) == ("robust", {"robust": "cola"}, tmp_path)


def test_the_internal_redis_listens_where_it_is_asked(chart: Chart) -> None:
    for given, port in (({}, 6379), ({"redis.port": 7000}, 7000)):
        manifests = chart.render({"redis.mode": "internal", **given})
        assert urlsplit(environment(manifests)["IRONCLIP_REDIS_URL"]).port == port
        (container,) = only(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
        assert container["ports"] == [{"name": "redis", "containerPort": port, "protocol": "TCP"}]
        assert f"port {port}\n" in only(manifests, "ConfigMap", "-redis")["data"]["redis.conf"]


def test_artifacts_are_mounted_from_where_they_are(chart: Chart) -> None:
    kinds = {"production": "persistentVolumeClaim", "gateway-hpa": "emptyDir", "oci-image": "image"}
    for file, kind in kinds.items():
        pod = only(chart.render(files=[ci_file(file)]), "Deployment")["spec"]["template"]["spec"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "models"]
        assert kind in volume
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "models"]
        assert mount["readOnly"] is True
    (init,) = only(chart.render(files=[ci_file("gateway-hpa")]), "Deployment")["spec"]["template"]["spec"][
        "initContainers"
    ]
    assert shlex.join(init["command"]) == "aws s3 sync s3://artifacts/robust /models/robust"


def test_every_volume_that_is_mounted_is_there(chart: Chart) -> None:
    for file in CI_FILES:
        for name, template in pod_specs(chart.render(files=[file])).items():
            pod = template["spec"]
            there = {volume["name"] for volume in pod.get("volumes", [])} | (
                {"data"} if name.startswith("StatefulSet") else set()
            )
            containers = [*pod["containers"], *pod.get("initContainers", [])]
            mounted = {mount["name"] for c in containers for mount in c.get("volumeMounts", [])}
            assert mounted <= there, (file, name)


def test_one_replica_with_a_claim_is_replaced_not_doubled(chart: Chart) -> None:
    spec = only(chart.render(files=[ci_file("oci-image")]), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "Recreate"}
    # Kubernetes refuses a rollingUpdate beside it, and the default of the values is one.
    assert only(chart.render({"strategy.type": "Recreate"}), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
