"""What README and docs/speed.md say of dtypes on a CPU, made from the benchmark's result alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_PATH = "benchmarks/results/dtypes.json"


def dtypes() -> str:
    """A table: each encoder's forwards by dtype, as multiples of float32's speed, with the drift."""
    path = ROOT / _PATH
    if not path.exists():
        return "Not measured yet: `python -m benchmarks.dtypes`.\n"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sizes = [one["batch"] for one in found["encoders"][0]["batches"]]
    head = [f"batch {size}" for size in sizes]
    lines = [
        "| encoder | dtype | products in | " + " | ".join(head) + " | gradients, " + head[-1] + " | least cosine |",
        "|---" * (len(sizes) + 5) + "|",
    ]
    for encoder in found["encoders"]:
        for name, cosine in encoder["min_cosine"].items():
            speeds = [_times(one["ms"]["forward"], name) for one in encoder["batches"]]
            gradients = _times(encoder["batches"][-1]["ms"]["gradient"], name)
            told = "random weights" if encoder["encoder"].startswith("random:") else f"{cosine:.5f}"
            cells = [f"`{encoder['encoder']}`", name, encoder["arithmetic"][name], *speeds, gradients, told]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Multiples of float32's speed, the best of rounds taken in turns; cosine with float32's features on "
        f"{found['encoders'][0]['pictures']} pictures. `python -m benchmarks.dtypes`, {found['cpu']}, "
        f"{found['threads']} threads, commit {found['commit'][:12]}; [all numbers]({_PATH}).",
    ]
    return "\n".join(lines) + "\n"


def dtypes_line() -> str:
    """What int8 buys and costs, of each encoder."""
    path = ROOT / _PATH
    if not path.exists():
        return ""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    last = [one["batches"][-1] for one in found["encoders"]]
    parts = [
        f"{_times(batch['ms']['forward'], 'int8')} times float32's speed for `{one['encoder']}`"
        for one, batch in zip(found["encoders"], last, strict=True)
    ]
    return (
        f"- `IRONCLIP_DTYPE=int8` on a CPU ({found['cpu']}, {found['threads']} threads), at batch {last[0]['batch']}: "
        f"{'; '.join(parts)}.\n"
    )


def _times(milliseconds: dict[str, float], name: str) -> str:
    return f"{milliseconds['float32'] / milliseconds[name]:.2f}"
