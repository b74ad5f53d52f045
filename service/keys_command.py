"""`python -m service keys`: make a key, and check a keys file."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import string
import sys
from datetime import date, datetime
from pathlib import Path

from service.keys import ID_PATTERN, SCOPES, digest_of, new_secret, parse_keys, read_keys
from service.settings import SettingsInvalid

_NOBODY = re.compile(r"^\s*keys\s*=\s*\[\s*\]", re.MULTILINE)
_ALPHABET = string.ascii_lowercase + string.digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    added = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = added.add_parser(
        "new",
        help="print a new key, once, and its entry for the file",
        description="Print a new API key and its entry for the keys file. The key is shown this once; the file has "
        "only its hash.",
    )
    new.add_argument("--tenant", required=True, help='whose key it is; "" is the tenant of a service without keys')
    new.add_argument("--scopes", nargs="+", choices=SCOPES, default=["infer"], help="what it may do (infer)")
    new.add_argument("--points-per-minute", type=int, metavar="N", help="limit its rate; not limited if not given")
    new.add_argument("--burst", type=int, metavar="N", help="points it may spend at once (points per minute)")
    new.add_argument("--expires", metavar="DATE", help="2027-01-31, or 2027-01-31T12:00:00Z")
    new.add_argument("--comment", default="", help="a note for the file")
    new.add_argument("--id", default="", help="its name in file and log (random if not given)")
    new.add_argument(
        "--append", type=Path, metavar="FILE", help="add the entry to this file; only the key itself is then printed"
    )
    check = added.add_parser("check", help="read a keys file and say what is in it, or what is wrong")
    check.add_argument("file", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Run one action; returns the exit status: 0, or 2 for what cannot be used."""
    try:
        return _new(arguments) if arguments.action == "new" else _check(arguments.file)
    except SettingsInvalid as error:
        print(error.detail, file=sys.stderr)
        return 2


def _check(path: Path) -> int:
    keys = read_keys(path)
    if not keys:
        print("`keys = []`: nobody is let in.")
        return 0
    rows = [("id", "tenant", "scopes", "points", "expires", "comment")]
    for key in keys.values():
        rate = "not limited"
        if key.points_per_minute is not None:
            rate = f"{key.points_per_minute} a minute, burst {key.burst or key.points_per_minute}"
        until = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M %Z}"
        until += " (expired)" if key.expired() else ""
        rows.append((key.id, key.tenant or '""', " ".join(sorted(key.scopes)), rate, until, key.comment))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _new(arguments: argparse.Namespace) -> int:
    identity = arguments.id or "".join(secrets.choice(_ALPHABET) for _ in range(10))
    if not re.fullmatch(ID_PATTERN, identity):
        raise SettingsInvalid(f"--id is to match {ID_PATTERN}")
    secret = new_secret()
    entry = _entry(arguments, identity, digest_of(secret).hex())
    (key,) = parse_keys(entry).values()
    if key.expired():
        raise SettingsInvalid("--expires lies in the past")
    path: Path | None = arguments.append
    if path is not None:
        _append(path, entry)
        print(f"ick_{identity}_{secret}")
        print(f"Added {identity} to {path}. The key is not shown again.", file=sys.stderr)
        return 0
    print(f"The key, shown this once:\n\n  ick_{identity}_{secret}\n\nFor the keys file:\n\n{entry}", end="")
    return 0


def _entry(arguments: argparse.Namespace, identity: str, digest: str) -> str:
    fields: dict[str, str] = {
        "id": _text(identity),
        "sha256": _text(digest),
        "tenant": _text(arguments.tenant),
        "scopes": "[" + ", ".join(_text(scope) for scope in dict.fromkeys(arguments.scopes)) + "]",
    }
    if arguments.points_per_minute is not None:
        fields["points_per_minute"] = str(arguments.points_per_minute)
    if arguments.burst is not None:
        fields["burst"] = str(arguments.burst)
    if arguments.expires:
        fields["expires"] = _moment(arguments.expires)
    if arguments.comment:
        fields["comment"] = _text(arguments.comment)
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


def _moment(text: str) -> str:
    """A date or a moment as TOML writes it; raises SettingsInvalid."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return date.fromisoformat(text).isoformat()
        return datetime.fromisoformat(text.replace("Z", "+00:00")).isoformat()
    except ValueError:
        raise SettingsInvalid(
            "--expires is a date such as 2027-01-31, or a moment such as 2027-01-31T12:00:00Z"
        ) from None


def _text(value: str) -> str:
    """A TOML string; what TOML does not allow in one is left out."""
    return json.dumps(re.sub(r"[\x00-\x1f\x7f]+", " ", value), ensure_ascii=False)


def _append(path: Path, entry: str) -> None:
    """Add an entry in one write, so that two that are added at once are both there.

    Raises:
        SettingsInvalid: the file cannot be used as it is, has the id already, or cannot be written to.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _NOBODY.search(text):
        raise SettingsInvalid(f"{path} says `keys = []`, which lets nobody in: take that line out first")
    if text.strip():
        parse_keys(text + "\n" + entry)
    gap = "" if not text.strip() else "\n" if text.endswith("\n") else "\n\n"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            file.write((gap + entry).encode())
    except OSError as error:
        raise SettingsInvalid(f"{path} cannot be written to ({type(error).__name__})") from None
