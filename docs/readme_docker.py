"""What `make image-test` measured, as docker/README.md shows it."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measured() -> str:
    """A sentence for each image in docker/results.json, with what it was measured on."""
    results = json.loads((ROOT / "docker" / "results.json").read_text(encoding="utf-8"))
    lines = []
    for name, found in results.items():
        if name == "compose":
            continue
        folders = ", ".join(f"{folder} {mib} MiB" for folder, mib in found["folder_mib"].items())
        line = f"- {name}, `{found['variant']}`: {found['image_mb'] / 1000:.1f} GB ({folders})"
        if name == "service":
            ready = found["start_to_ready_seconds"]
            line += (
                f"; ready {ready['median']} s after the start (median of {len(ready['all'])}: "
                f"{', '.join(map(str, ready['all']))}), {found['resident_mib_after_a_classification']} MiB resident "
                f"after a classification, {found['drain_seconds_with_a_request_in_flight']} s from SIGTERM to the end "
                "with a request in flight"
            )
        else:
            line += f"; two training steps from start to artifact in {found['seconds_of_two_training_steps']} s"
        line += (
            f". {found['engine']}, {found['cores']} cores at a load of {found['load_average'][0]}, base "
            f"`{found['base'].rsplit('/', 1)[-1]}`, commit {found['commit'][:12]}{' and changes' * found['modified']}."
        )
        lines.append(line)
    return "\n".join(lines) + "\n"


def composed() -> str:
    """What `make compose-test` found, with what it was run on."""
    found = json.loads((ROOT / "docker" / "results.json").read_text(encoding="utf-8")).get("compose")
    if found is None:
        return "Not run yet: `make compose-test`.\n"
    built = found["image_commit"]
    built = built[:12] + " and changes" * built.endswith("-modified")
    images = [f"`{found[name]}`" for name in ("redis_image", "prometheus_image") if found[name]]
    changes = " and changes" * found["modified"]
    return (
        f"Healthy {found['seconds_until_healthy']} s after `docker compose up`; Redis was killed, and used again "
        f"{found['seconds_until_redis_is_used_again']} s after it was started; with requests in flight the service was "
        f"gone {found['seconds_of_the_drain']} s after `docker compose stop`. Docker {found['engine']}, Compose "
        f"{found['compose']}, {found['cores']} cores at a load of {found['load_average'][0]}; images "
        f"`{found['image']}` of commit {built}, {' and '.join(images)}; compose.yaml of commit "
        f"{found['commit'][:12]}{changes}.\n"
    )
