"""Tables of README and docs, from the files that hold the numbers; `make readme` puts them in, a test compares."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from training.markdown import table

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "ironclip" / "demo"
RESULTS = ROOT / "loadtests" / "results"
SHARE_AIM, LATENCY_AIM = 0.85, 1.2
# A training step over its floor; 1.15 for the other methods.
STEP_AIMS = {"simclip": 1.1, "fare": 1.1, "tecoa": 1.1}


def from_docs(text: str) -> str:
    """Text for the README, with its relative links as they are from a file in docs/."""
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda found: f"]({_from_docs(found[1])})", text)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def settings_table() -> str:
    """Every setting of the service."""
    from service.settings_table import settings_markdown

    return settings_markdown()


def _meta(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO / folder / "ironclip.json").read_text(encoding="utf-8"))
    return content


def worth() -> str:
    """The two results by which the whole is to be judged, each with what it is held against."""
    from docs import readme_loads, readme_robust

    return f"In numbers, each with its aim: {readme_robust.robust_line()}; {readme_loads.peers_line()}.\n"


def demo_table(flags: bool = True) -> str:
    """Scores of the encoders that ship, as their `ironclip.json` has them; flags in rows of their own, or left out."""
    columns = {
        "top1": "top-1",
        "top5": "top-5",
        "subgroup_prompts": "subgroup, own prompts",
        "subgroup_rollup": "subgroup, roll-up",
        "group_prompts": "group, own prompts",
        "group_rollup": "group, roll-up",
    }
    rows = []
    for folder in sorted(path.parent.name for path in DEMO.glob("*/ironclip.json")):
        meta = _meta(folder)
        for vendor, parts in meta["scores"].items():
            for part, title in (("without_flags", ""), ("flags", ", flags only")):
                if part in parts and (flags or not title):
                    scores = parts[part]
                    cells = [f"{scores[key]:.1f} %" for key in columns]
                    name = f"`{meta['name']}`" if not title else ""
                    rows.append([name, f"{vendor}{title}", str(scores["pictures"]), *cells])
    return table(["encoder", "test vendor", "pictures", *columns.values()], rows)


# What the demo encoder was meant to reach on the test vendors, in percent, flags left out.
AIMS = {
    "emojione": {"top1": 60, "top5": 85, "subgroup_prompts": 55, "subgroup_rollup": 75},
    "openmoji": {"top1": 35, "top5": 60},
}


def demo_limits() -> str:
    """What the demo encoder's own numbers say of its limits."""
    trained = json.loads((ROOT / "docs" / "demo-scores-trained.json").read_text(encoding="utf-8"))["scores"]
    shares = [parts["without_flags"]["top1"] for parts in trained.values()]
    meta = _meta("convnet")
    seen = meta["config"]["steps_done"] * meta["config"]["batch_size"]
    outside = meta["domain"]["called_outside_percent"]["photos"]
    verdicts = []
    for vendor, aims in AIMS.items():
        scores = meta["scores"][vendor]["without_flags"]
        parts = [f"{key} {aim} ({'met' if scores[key] >= aim else 'missed'})" for key, aim in aims.items()]
        verdicts.append(f"{vendor} {', '.join(parts)}")
    return (
        f"The aims for `demo`, in percent: {'; '.join(verdicts)}. On art that it was trained on "
        f"({', '.join(trained)}), top-1 is {min(shares):.0f} to {max(shares):.0f} %; its run saw {seen:,} pictures. "
        "So it has learnt its own art, and what is missing is variety of art; what was tried stands under `tried` in "
        "`ironclip/demo/convnet/ironclip.json`. "
        f"Its `domain` warning catches {outside:.0f} % of the photographs (random crops of them) that it was measured "
        "on.\n"
    )


def choice_table() -> str:
    """Short runs that the demo's settings were chosen on, from ``docs/choice``."""
    rows: list[list[str]] = []
    titles: list[str] = []
    for path in sorted((ROOT / "docs" / "choice").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        config, scores = report["encoder"]["config"], report["scores"]
        titles = titles or [f"{vendor}{' (left out)' * (vendor in config['left_out'])}" for vendor in scores]
        cells = [f"{parts['without_flags']['top1']:.1f} %" for parts in scores.values()]
        seen = config["steps_done"] * config["batch_size"]
        stock = sum(report["encoder"]["training_pictures"].values())
        chosen = (config["optimiser"], f"{config['learning_rate']:g}", f"{config['label_smoothing']:g}")
        rows.append([*chosen, f"{stock:,}", f"{seen:,}", *cells])
    return table(["optimiser", "learning rate", "label smoothing", "pictures", "seen", *titles], rows)


def bench_table() -> str:
    """Medians of the last run of `make bench`."""
    report = json.loads((RESULTS / "bench_floor.json").read_text(encoding="utf-8"))
    rows = []
    titles = ["JPEG", "clients", "images/s", "of the floor", "by CPU time", "p50", "p99", "p50 over decode + forward"]
    for size, result in report["sizes"].items():
        for concurrency, row in result["median"]["embed"].items():
            rounds = [one["embed"][concurrency]["share_of_floor"] for one in result["rounds"]]
            spread = f"{row['share_of_floor']:.0%} ({100 * min(rounds):.0f} to {max(rounds):.0%})"
            shares = [spread, f"{row['share_of_floor_by_cpu_time']:.0%}"]
            times = [f"{row[part]:.0f} ms" for part in ("p50_ms", "p99_ms")]
            speed, latency = f"{row['images_per_second']:.1f}", f"{row['latency_over_decode_and_forward']:.2f}"
            rows.append([size, concurrency, speed, *shares, *times, latency])
    count = min(len(result["rounds"]) for result in report["sizes"].values())
    said = [
        "",
        f"Medians of {count} rounds, in brackets the least and the most: where these lie on both sides of an aim, so "
        f"may the next. {_bench_verdict(report)}",
        "",
        _bench_made_by(report),
    ]
    return table(titles, rows) + "\n".join(said) + "\n"


def bench_line() -> str:
    """What `bench_table` comes to."""
    report = json.loads((RESULTS / "bench_floor.json").read_text(encoding="utf-8"))
    return f"{_bench_verdict(report)} {_bench_made_by(report)}\n"


def _bench_verdict(report: dict[str, Any]) -> str:
    served = [result["median"]["embed"] for result in report["sizes"].values()]
    share = min(row["32"]["share_of_floor"] for row in served)
    latency = max(row["1"]["latency_over_decode_and_forward"] for row in served)
    return (
        f"Least share at 32 clients {share:.0%} ({'met' if share >= SHARE_AIM else 'not met yet'}); "
        f"largest latency at one client {latency:.2f} ({'met' if latency <= LATENCY_AIM else 'not met yet'})."
    )


def _bench_made_by(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"`{report['command'].strip()}`, {report['model']}, {report['dtype']['chosen']}; {machine['cpu']}, "
        f"{machine['cores']} cores; seed {report['seed']}, commit {report['commit'][:12]}"
        f"{' with changes' * bool(report['modified'])}; [all numbers](loadtests/results/bench_floor.json)."
    )


def step_tables() -> str:
    """Training steps over their floor, a table for each file of `python -m benchmarks.training_step`."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("training_step*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for method, found in report["methods"].items():
            plain = f"{found['plain_over_step']:.1f} ({found['plain_dtype']})" if "plain_dtype" in found else "-"
            seconds = f"{found['seconds']['step']:.2f}"
            steps = str(found["iterations"])
            share = f"{found['objectives_of_step']:.1%}" if "objectives_of_step" in found else "-"
            met = found["step_over_floor"] <= STEP_AIMS.get(method, 1.15)
            over = f"{found['step_over_floor']:.2f} ({'met' if met else 'missed'})"
            rows.append([f"`{method}`", found["dtype"], steps, seconds, over, share, plain])
        base = next(
            (part.removeprefix("base=") for part in report["set"] if part.startswith("base=")), report["config"]
        )
        threads = f", {report['threads']} threads" if report["device"] == "cpu" else ""
        parts.append(f"`{base}`, batches of {report['batch']}, {report['device']}{threads}:\n")
        titles = ["method", "dtype", "attack steps", "seconds", "over its floor", "objectives' share"]
        titles.append("plain re-creation over it")
        parts.append(table(titles, rows))
    return "\n".join(parts)


def tree_of_the_house() -> str:
    """The top two floors of the repository, one phrase a room, from the docstrings."""
    import ast

    rows = []
    for package in ("ironclip", "service", "training", "loadtests", "benchmarks"):
        rows.append(f"{package + '/':<28}{_first_line(ROOT / package / '__init__.py')}")
        entries = sorted((ROOT / package).iterdir(), key=lambda path: (path.is_dir(), path.name))
        for entry in entries:
            if entry.name.startswith(("_", ".")) or (entry.is_file() and entry.suffix != ".py"):
                continue
            source = entry if entry.is_file() else entry / "__init__.py"
            if source.is_file():
                ast.parse(source.read_text(encoding="utf-8"))
                name = entry.name + ("/" if entry.is_dir() else "")
                rows.append(f"  {name:<26}{_first_line(source)}")
    client = ROOT / "clients" / "python" / "src" / "ironclip_client" / "__init__.py"
    rows.append(f"{'clients/python/':<28}{_first_line(client)}")
    return "```\n" + "\n".join(rows) + "\n```\n"


def _first_line(path: Path) -> str:
    import ast

    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = docstring.partition("\n")[0].rstrip(".")
    head, colon, tail = line.partition(": ")
    # "Encoder: an open_clip model ..." says its own name first.
    return tail if colon and len(head) < 28 else line
