"""The table of all settings, for docs/settings.md and `python -m service settings --markdown`."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.settings import PREFIX, Settings


def settings_markdown() -> str:
    """Return the table of all settings for docs/settings.md."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        bounds = _bounds(field)
        meaning = (field.description or "") + (f" ({bounds})" if bounds else "")
        rows.append(
            f"| `{PREFIX}{name.upper()}` | {_default(field)} | {meaning.replace(chr(124), chr(92) + chr(124))} |"
        )
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr) or value is None or value in ("", ()):
        return ""
    if isinstance(value, dict):
        value = ",".join(f"{name}={spec}" for name, spec in value.items())
    return f"`{value}`"


def _bounds(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    least = next((item.ge for item in field.metadata if hasattr(item, "ge")), None)
    most = next((item.le for item in field.metadata if hasattr(item, "le")), None)
    if least is not None and most is not None:
        return f"{least} to {most}"
    return f"at least {least}" if least is not None else ""
