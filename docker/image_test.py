"""`make image-test`: build the images, run them as they are meant to be run, and measure them.

The service is started as a user without rights or capabilities, on a read-only root, with a CPU quota; asked to
classify a picture; looked through for anything it could write to; and stopped while it works on a request. The training
image trains a few steps. What was measured goes to docker/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from engine import Engine, EngineError, find_engine
from image_service import HARDENED, TMP, USER, VOLUMES, Service, check_drain, check_running, check_volumes
from results import RESULTS, ROOT, git, modified, read_results, write_results

# Runs in the container: everything that its user could write to, outside what is meant for that.
_WRITABLE = """
import os, stat
skip = {"/proc", "/sys", "/dev", "/tmp", "/run/secrets", *VOLUMES}
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(top, f) not in skip]
    for path in (top, *(os.path.join(top, f) for f in files)):
        if not os.path.islink(path) and os.access(path, os.W_OK):
            # Debian's /var/tmp and /run/lock are for everyone; a read-only root closes them.
            if not (STICKY and os.stat(path).st_mode & stat.S_ISVTX):
                print(path)
"""


def main() -> int:
    """Build, run and measure; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the images, run them hardened, measure them.")
    parser.add_argument("--variant", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--base-image", default="python:3.12-slim-bookworm")
    parser.add_argument("--only", choices=("service", "training"))
    parser.add_argument("--starts", type=int, default=3, help="how often the start is measured")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "image-test", help="of Podman's images")
    parser.add_argument("--keep", action="store_true", help="leave the images, to look at them or to go on faster")
    arguments = parser.parse_args()
    try:
        engine = find_engine(arguments.store)
        variant = arguments.variant if arguments.variant != "auto" else _reachable_variant()
        base = engine.base_image(arguments.base_image)
        results: dict[str, Any] = read_results()
        if arguments.only != "training":
            results["service"] = test_service(engine, base, variant, arguments.starts)
            write_results(results)
        if arguments.only != "service":
            results["training"] = test_training(engine, base, variant)
            write_results(results)
    except (EngineError, AssertionError) as error:
        print(f"image-test: {error or 'a check failed'}", file=sys.stderr)
        if not isinstance(error, EngineError):
            raise
        return 1
    finally:
        if not arguments.keep and "engine" in locals():
            engine.close()
    print(f"image-test: all checks passed; {RESULTS.relative_to(ROOT)} has what was measured")
    return 0


def test_service(engine: Engine, base: str, variant: str, starts: int) -> dict[str, Any]:
    """Build and check the service's image; returns what was measured."""
    tag = f"localhost/ironclip:{variant}"
    build(engine, "service", tag, base, variant)
    check_metadata(engine, tag)
    check_permissions(engine, tag)
    ready = [_start_and_stop(engine, tag) for _ in range(max(0, starts - 1))]
    check_volumes(engine, tag)
    container = Service(engine, tag, "--cpus=1.0", "--memory=4g")
    try:
        ready.append(container.wait_ready())
        resident = check_running(container, cpus=1)
        drain = check_drain(container)
    finally:
        container.remove()
    return {
        **describe(engine, tag, base, variant),
        "start_to_ready_seconds": {"median": round(statistics.median(ready), 1), "all": [round(s, 1) for s in ready]},
        "resident_mib_after_a_classification": resident,
        "drain_seconds_with_a_request_in_flight": round(drain, 2),
        "settings": "demo, demo-robust, demo-vit; dtype auto; all but the last start without a CPU limit, that with 1",
    }


def test_training(engine: Engine, base: str, variant: str) -> dict[str, Any]:
    """Build the training image and train a few steps in it; returns what was measured."""
    tag = f"localhost/ironclip-training:{variant}"
    build(engine, "training", tag, base, variant)
    options = [*engine.run_options(), *HARDENED, TMP, "--rm"]
    assert "tecoa" in engine.run("run", *options, tag)  # --help is what it does when nothing is asked
    folder = Path(mkdtemp())
    try:
        for picture in sorted((ROOT / "ironclip/demo/samples").glob("*.[pw]*")):
            (folder / "pictures" / picture.stem).mkdir(parents=True)
            shutil.copy(picture, folder / "pictures" / picture.stem)
        (folder / "runs").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        settings = ["steps=2", "budget=0", "batch_size=4", "evaluate_count=0", "warmup=0", "data.kind=folder"]
        settings += ["data.path=/pictures", "attack.iterations=1", "dtype=float32"]
        volumes = [f"--volume={folder}/pictures:/pictures:ro", f"--volume={folder}/runs:/app/runs"]
        start = time.monotonic()
        print(engine.run("run", *options, *volumes, tag, "tecoa", "--config", "demo", *settings, timeout=600))
        trained = time.monotonic() - start
        artifact = folder / "runs" / "demo-tecoa" / "artifact"
        assert (artifact / "ironclip.json").is_file(), sorted(folder.rglob("*"))
        assert (artifact / "ironclip.json").stat().st_uid == USER
        assert git("rev-parse", "HEAD") in (artifact / "ironclip.json").read_text(encoding="utf-8")
    finally:
        shutil.rmtree(folder)
    measured = {"seconds_of_two_training_steps": round(trained, 1)}
    return describe(engine, tag, base, variant) | measured


def build(engine: Engine, name: str, tag: str, base: str, variant: str) -> None:
    """Build one image."""
    print(f"==> building {tag} on {base}", flush=True)
    commit = git("rev-parse", "HEAD") + "-modified" * _modified()
    arguments = {"BASE_IMAGE": base, "VARIANT": variant, "REVISION": commit}
    engine.build(f"docker/{name}.Dockerfile", tag, arguments, ROOT, timeout=3600)


def check_metadata(engine: Engine, tag: str) -> None:
    """What the image says of itself, and that nothing of the build is in it."""
    (image,) = json.loads(engine.run("image", "inspect", tag))
    config = image["Config"]
    assert config["User"] == f"{USER}:{USER}", config["User"]
    assert config["StopSignal"] == "SIGTERM", config
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "service"]  # exec form: it gets the signals
    health = config.get("Healthcheck") or image.get("Healthcheck")
    assert health["Test"][0] == "CMD", health
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    revision = config["Labels"]["org.opencontainers.image.revision"]
    assert len(revision.removesuffix("-modified")) == 40, config["Labels"]
    said = json.dumps(image) + engine.run("history", "--no-trunc", tag)
    for place in ("file://", "find-links"):
        assert place not in said, f"the image's history has {place}"
    looked = engine.run(
        "run",
        "--rm",
        *engine.run_options(),
        "--entrypoint=/bin/sh",
        tag,
        "-c",
        (
            "for p in pip gcc cc make curl; do command -v $p && echo present; done; "
            "ls -A /run/secrets /root/.cache /root/.config /etc/pip.conf 2>/dev/null; true"
        ),
    )
    assert looked.replace("/usr/local/bin/pip\npresent", "").strip() == "", looked


def check_permissions(engine: Engine, tag: str) -> None:
    """Nothing is writable, by its mode alone and again under a read-only root; the settings can be printed."""
    options = ["--rm", *engine.run_options(), "--entrypoint=/opt/venv/bin/python"]
    for extra in ((), (*HARDENED, TMP)):
        code = f"VOLUMES, STICKY = {VOLUMES!r}, {not extra}\n{_WRITABLE}"
        found = engine.run("run", *options, *extra, tag, "-c", code)
        assert found == "", f"writable for the image's user: {found}"
    assert "IRONCLIP_PORT" in engine.run("run", "--rm", *engine.run_options(), *HARDENED, TMP, tag, "settings")
    wrong = engine.run("run", "--rm", *engine.run_options(), "--env=IRONCLIP_PROT=1", tag, check=False)
    assert "did you mean IRONCLIP_PORT" in wrong, wrong


def describe(engine: Engine, tag: str, base: str, variant: str) -> dict[str, Any]:
    """What was built on what, how large it is, and where the size comes from."""
    (image,) = json.loads(engine.run("image", "inspect", tag))
    folders = "/opt/torch /opt/venv /app"
    sizes = engine.run("run", "--rm", *engine.run_options(), "--entrypoint=/bin/sh", tag, "-c", f"du -sm {folders}")
    return {
        "variant": variant,
        "base": base,
        "engine": engine.run("--version"),
        "image_mb": round(image["Size"] / 1e6),
        "folder_mib": {line.split()[1]: int(line.split()[0]) for line in sizes.splitlines()},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "commit": git("rev-parse", "HEAD"),
        "modified": _modified(),
    }


def _modified() -> bool:
    return modified("ironclip", "service", "training", "docker")


def _start_and_stop(engine: Engine, tag: str) -> float:
    container = Service(engine, tag)
    try:
        return container.wait_ready()
    finally:
        container.remove()


def _reachable_variant() -> str:
    """cpu where the index of CPU builds can be reached from here, else cuda, which runs on a CPU too."""
    # Not by pip: it would find torch on the other indexes of its configuration too.
    try:
        with urllib.request.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=10) as answer:
            if answer.status == 200:
                return "cpu"
    except OSError:
        pass
    print("the index of CPU builds cannot be reached: the image with CUDA instead, run on the CPU", flush=True)
    return "cuda"


if __name__ == "__main__":
    sys.exit(main())
