"""What of the Helm chart is made from elsewhere: its table of values, and the schema of the service's settings.

`python -m docs.chart` writes the schema's part, cog the table in k8s/ironclip/README.md; `make readme` does both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings
from training.markdown import table

CHART = Path(__file__).parent.parent / "k8s" / "ironclip"
# Settings that a key of values.yaml stands for; in `settings` they would contradict it.
OWN_KEYS = {
    "host": "the container listens on every interface",
    "port": "the container's port is 8000; the Service's is service.port",
    "encoders": "use encoders",
    "default_encoder": "use defaultEncoder",
    "defences": "use defences",
    "device": "use gpu.enabled",
    "dtype": "use dtype",
    "redis_url": "use redis",
    "redis_mac_key": "use redis",
    "redis_prefix": "use redis.prefix",
    "state_dir": "use state",
    "drain_seconds": "use drain.seconds",
    "drain_delay_seconds": "use drain.delaySeconds",
    "metrics_port": "use metrics.port",
    "keys_file": "use keys",
}
_KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):(.*)$")


def settings_schema() -> dict[str, Any]:
    """JSON Schema of `settings`: every setting of the service that has no key of its own, with its type and bounds."""
    properties = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        if name in OWN_KEYS:
            continue
        kept = {key: value for key, value in field.items() if key not in ("title", "format", "writeOnly", "default")}
        if kept.get("type") in ("array", "object"):
            kept["type"] = [kept["type"], "string"]
        properties[name] = kept
    return {
        "description": "Settings of the service by their names without IRONCLIP_. Not here: "
        + "; ".join(f"{name} ({instead})" for name, instead in OWN_KEYS.items()),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def schema_text() -> str:
    """The text of values.schema.json with the current settings in it."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def documented_values() -> dict[str, tuple[Any, str]]:
    """Path of each key of values.yaml that has a comment -> its default and that comment, in the file's order."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)
    found: dict[str, tuple[Any, str]] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
            continue
        key = _KEY.match(line)
        if key:
            path = [(depth, name) for depth, name in path if depth < len(key[1])] + [(len(key[1]), key[2])]
            if comment:
                value: Any = defaults
                for _, name in path:
                    value = value[name]
                found[".".join(name for _, name in path)] = (value, " ".join(comment))
        comment = []
    return found


def values_table() -> str:
    """Every key of values.yaml with its default and what it means."""
    rows = []
    for path, (value, meaning) in documented_values().items():
        shown = json.dumps(value, ensure_ascii=False) if value not in ({}, []) else json.dumps(value)
        rows.append([f"`{path}`", f"`{shown}`", meaning.replace("|", "\\|")])
    return table(["key", "default", "meaning"], rows)


def main() -> None:
    """Write values.schema.json."""
    (CHART / "values.schema.json").write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
