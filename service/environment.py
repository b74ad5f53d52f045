"""What else than settings the service reads from its environment, and what it writes there for what it starts."""

from __future__ import annotations

import os

from service.settings import PREFIX, SettingsInvalid

# Of OpenTelemetry's variables those that are looked at here; its SDK reads them all.
_OTEL = (
    "SDK_DISABLED",
    "TRACES_EXPORTER",
    "EXPORTER_OTLP_ENDPOINT",
    "EXPORTER_OTLP_TRACES_ENDPOINT",
    "EXPORTER_OTLP_PROTOCOL",
    "EXPORTER_OTLP_TRACES_PROTOCOL",
)


def traces_wanted() -> bool:
    """Whether OpenTelemetry's own variables name a collector for traces.

    Raises:
        SettingsInvalid: they ask for a protocol or an exporter that is not here.
    """
    environ = {name: os.environ.get(f"OTEL_{name}", "").strip() for name in _OTEL}
    if environ["SDK_DISABLED"].lower() == "true" or environ["TRACES_EXPORTER"] == "none":
        return False
    if not (environ["EXPORTER_OTLP_ENDPOINT"] or environ["EXPORTER_OTLP_TRACES_ENDPOINT"]):
        return False
    if environ["TRACES_EXPORTER"] not in ("", "otlp"):
        raise SettingsInvalid("OTEL_TRACES_EXPORTER: traces are sent by `otlp` alone; `none` turns them off")
    for name in ("EXPORTER_OTLP_TRACES_PROTOCOL", "EXPORTER_OTLP_PROTOCOL"):
        if environ[name] not in ("", "http/protobuf"):
            raise SettingsInvalid(f"OTEL_{name}: only http/protobuf is spoken here (mostly port 4318)")
    return True


def let_idle_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait for each other; call before torch is imported.

    They spin by default, which is a little faster on an idle machine. Decoding and the event loop share the
    cores with the model, though, and a spinning thread then waits for one that it keeps from running: measured
    10 to 40 times slower. `OMP_WAIT_POLICY` in the environment wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def heaps_are_limited() -> bool:
    """Whether the environment tells glibc how many heaps to have."""
    return "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", "")


def process_environment(device: str, **settings: object) -> dict[str, str]:
    """This process's environment for a service process of its own on one device, with other settings.

    A GPU is made the only one that the process sees: else some of its memory would go to the first one.

    Args:
        device: `cpu` or `cuda:N`, N among the GPUs that this process sees.
        settings: by field.

    Raises:
        SettingsInvalid: there is no such GPU by CUDA_VISIBLE_DEVICES.
    """
    environment = dict(os.environ)
    kind, _, number = device.partition(":")
    if kind == "cuda":
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        if visible and int(number) >= len(visible):
            raise SettingsInvalid(f"{device}: CUDA_VISIBLE_DEVICES leaves {len(visible)} GPUs, numbered from 0")
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(number)].strip() if visible else number
    settings = {"device": kind, **settings}
    return environment | {f"{PREFIX}{name.upper()}": str(value) for name, value in settings.items()}
