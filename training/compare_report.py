"""What a study's comparison found (transfer, levels, depth, retrieval), as tables and plots from its JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.examples import WHOLE, share_table
from training.markdown import table


def _load(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of each JSON file in a folder -> its content."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _levels(results: Path, mode: str) -> dict[str, dict[str, Any]]:
    """Encoder -> its matrix of levels, scored by ``mode``."""
    of_all = _load(results / "levels").items()
    return {name.removesuffix(f"-{mode}"): content for name, content in of_all if name.endswith(f"-{mode}")}


def plot_levels(results: Path, mode: str) -> Path | None:
    """``levels-MODE.png``: for each encoder a heat map, level attacked against level scored; None without results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = _levels(results, mode)
    if not found:
        return None
    across = min(5, len(found))
    down = -(-len(found) // across)
    figure, grid = plt.subplots(down, across, figsize=(2.3 * across, 2.5 * down), layout="constrained", squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    for axes, (name, content) in zip(grid.flat, found.items(), strict=False):
        rows = {"(clean)": content["clean"], **content["attacked"]}
        scored = list(content["clean"])
        values = [[row[level]["percent"] for level in scored] for row in rows.values()]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        axes.set_xticks(range(len(scored)), scored, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(name, fontsize=9)
    figure.supylabel("level attacked", fontsize=9)
    figure.supxlabel("level scored", fontsize=9)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="accuracy (%)", shrink=0.8)
    path = results / f"levels-{mode}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_depth(results: Path) -> Path | None:
    """``depth.png``: norms, margins and accuracy of hyperbolic heads by level, leaves first; None without results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = _load(results / "depth")
    if not found:
        return None
    figure, (norms, margins, shares) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for name, content in found.items():
        levels = list(content["levels"])
        places = range(len(levels))

        def draw(axes: Any, part: str, label: str, parts: Mapping[str, Mapping[str, Any]] = content["levels"]) -> None:
            low, middle, high = zip(*(parts[level][part] for level in parts), strict=True)
            errors = [
                [m - lo for m, lo in zip(middle, low, strict=True)],
                [h - m for m, h in zip(middle, high, strict=True)],
            ]
            axes.errorbar(range(len(parts)), middle, yerr=errors, marker="o", capsize=3, label=label)

        draw(norms, "norm", name)
        draw(margins, "margin", f"{name}, clean")
        draw(margins, "margin_attacked", f"{name}, attacked")
        for part in ("clean", "robust"):
            shares.plot(
                places, [content["levels"][level][part] for level in levels], marker="o", label=f"{name}, {part}"
            )
        for axes in (norms, margins, shares):
            axes.set_xticks(places, levels)
            axes.legend(fontsize=7)
    margins.axhline(0, color="grey", linewidth=0.8)
    norms.set_title("norm of the nodes in the ball", fontsize=9)
    margins.set_title("margin in distance (10th, 50th, 90th percentile)", fontsize=9)
    shares.set_title("accuracy at the level attacked (%)", fontsize=9)
    path = results / "depth.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def retrieval_table(results: Path) -> str:
    """Recall at 1 of each encoder, clean and attacked, both ways; and how often a target is reached."""
    rows: dict[str, dict[str, Any]] = {}
    for name, content in _load(results / "retrieval").items():
        rows.setdefault(name.removesuffix(f"-{content['goal']}"), {})[content["goal"]] = content
    goals = sorted({goal for row in rows.values() for goal in row}, key=["caption", "away", "towards"].index)
    titles = ["clean, picture to text", "clean, text to picture"]
    for goal in goals:
        titles += [f"{goal}: picture to text", f"{goal}: text to picture"]
        titles += ["target comes first"] * (goal == "towards")
    lines = []
    ways = ("image_to_text", "text_to_image")
    for name, row in rows.items():
        first = next(iter(row.values()))
        parts = [_share(first["clean"][way]["1"]) for way in ways]
        for goal in goals:
            if goal not in row:
                parts += ["-"] * (3 if goal == "towards" else 2)
                continue
            parts += [_share(row[goal]["attacked"][way]["1"]) for way in ways]
            parts += [_share(row[goal]["target"]["1"])] if goal == "towards" else []
        lines.append([name, *parts])
    return table(["encoder", *titles], lines)


def _share(content: Mapping[str, Any]) -> str:
    return f"{content['percent']:.1f} %"


def transfer_table(results: Path) -> str:
    """Accuracy on examples made on each encoder (rows), answered by each (columns)."""
    content = json.loads((results / "transfer.json").read_text(encoding="utf-8"))
    rows = {"(clean)": {name: {"robust": share} for name, share in content["clean"].items()}, **content["made_on"]}
    return share_table(rows, "made on, answered by", "robust")


def severity_table(results: Path, mode: str) -> str:
    """Mean severity of the wrong names (height of the lowest common ancestor), by the level attacked."""
    found = _levels(results, mode)
    levels = list(next(iter(found.values()))["severity"])
    titles = [f"{level} attacked" if level else "clean" for level in levels]
    lines = []
    for name, content in found.items():
        values = [content["severity"][level] for level in levels]
        lines.append([name, *("-" if value is None else f"{value:.2f}" for value in values)])
    return table(["encoder", *titles], lines)


def depth_table(results: Path) -> str:
    """Norms, margins and accuracy of hyperbolic heads by level."""
    lines = []
    for name, content in _load(results / "depth").items():
        for level, found in content["levels"].items():
            norm, before, after = (found[part][1] for part in ("norm", "margin", "margin_attacked"))
            shares = [f"{found[part]:.1f} %" for part in ("clean", "robust")]
            lines.append([name, level, str(found["nodes"]), f"{norm:.3f}", f"{before:.2f}", f"{after:.2f}", *shares])
        ordered = f"child deeper than parent, of {content['edges']} edges"
        lines.append([name, ordered, "", f"{content['in_order']:.1f} %", "", "", "", ""])
    return table(["encoder", "level", "nodes", "norm", "margin, clean", "margin, attacked", "clean", "robust"], lines)


def _made(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """How the examples of some results were made, from the results themselves."""
    ways = []
    for content in contents.values():
        sample = content.get("sample") or {"name": content["data"], "pictures": content["pictures"]}
        options = "".join(f" {key}={value}" for key, value in content["options"].items())
        encoders = content["encoders"].values() if "encoders" in content else [content["encoder"]]
        dtypes, devices = (", ".join(sorted({e.get(part, "cpu") for e in encoders})) for part in ("dtype", "device"))
        attack = f"{content['attack']}{options}, {content['threat']['label']}"
        ways.append(f"{attack}, {sample['pictures']} pictures of {sample['name']}, encoders in {dtypes} on {devices}")
    return (
        f"Attack: {'; '.join(dict.fromkeys(ways))}; examples rounded to 8 bits. One attack is weaker than AutoAttack."
    )


def early(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Said of examples that do not come of all of an attack's steps; empty where they all do."""
    if all(content.get("examples") == WHOLE for content in contents.values()):
        return ""
    return (
        " **These pictures stay where they first fool what was attacked**, just across its boundary, from where little "
        "carries over: whatever was not attacked itself is flattered, and is to be measured again."
    )


def compared(results: Path) -> list[str]:
    """Those parts of a study's README for which there are results."""
    parts = []
    if (results / "transfer.json").is_file():
        content = {"": json.loads((results / "transfer.json").read_text(encoding="utf-8"))}
        parts += ["## Transfer", "", TRANSFER, "", _made(content) + early(content), "", transfer_table(results)]
    if found := _load(results / "levels"):
        parts += ["## Levels of the tree", "", LEVELS, "", _made(found) + early(found), ""]
        for mode in ("rollup", "prompts"):
            if (drawn := plot_levels(results, mode)) is not None:
                parts += [f"By {mode}:", "", f"![{drawn.stem}]({drawn.name})", "", severity_table(results, mode)]
    if (drawn := plot_depth(results)) is not None:
        depth = _made(_load(results / "depth"))
        parts += ["## Depth", "", DEPTH, "", depth, "", depth_table(results), f"![depth]({drawn.name})", ""]
    if found := _load(results / "retrieval"):
        parts += ["## Retrieval", "", RETRIEVAL, "", _made(found), "", retrieval_table(results)]
    return parts


TRANSFER = (
    "Accuracy on examples made on one encoder (row) and answered by another (column). The diagonal is white box; the "
    "rest is transfer, which no attacker has to content himself with."
)
LEVELS = (
    "Each level of the tree attacked, each scored on the same pictures (`(clean)`: not attacked). Below, how far off "
    "the wrong names are: the mean height of the lowest common ancestor of name and answer, 1 being the same subgroup."
)
DEPTH = "Nodes of the hyperbolic head in the ball, medians; margins in units of distance."
RETRIEVAL = (
    "Recall at 1 under attacks on the embedding: from the own `caption` to the nearest other one, the strongest of the "
    "three; `away` from the clean embedding, which sees no text; `towards` a wrong caption drawn by chance. The last "
    "two are what is mostly attacked with, and flatter."
)
