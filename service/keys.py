"""API keys: who asks, for which tenant, what they may do and how fast; read from a file and read again when it changes.

A key on the wire is `ick_<id>_<secret>`. The file holds the SHA-256 of the secret. A slow hash such as argon2 protects
passwords that people choose; a secret of 256 random bits cannot be guessed from a fast one either, so that each request
can be checked in microseconds. Secrets of another form are refused: nobody can put a password here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service import telemetry
from service.errors import KeyExpired, KeyUnknown
from service.settings import SettingsInvalid

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scope = Literal["infer", "probe", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ID_PATTERN = r"[a-z0-9]{4,32}"
# "" is the tenant of a service without keys: a key for it reaches the label sets that were registered then.
TENANT_PATTERN = r"^([a-z0-9][a-z0-9-]{0,62})?$"
_KEY = re.compile(rf"ick_({ID_PATTERN})_([0-9a-f]{{64}})")
_LOOK_SECONDS = 1.0
# What an unknown id is compared with, so that it takes the same way as a known one.
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).digest()


class Key(BaseModel):
    """One entry of the keys file.

    Attributes:
        id: names the key in the file and in the log.
        sha256: hex of the SHA-256 of the secret's 64 hex digits.
        tenant: whose caches, label sets and probes it sees.
        scopes: what it may do.
        points_per_minute: how fast its bucket is refilled; None: it is not limited.
        burst: what its bucket holds; `points_per_minute` if not given.
        expires: until when it is taken, with a time zone; a bare date ends as it begins, in UTC.
        comment: for whoever reads the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=rf"^{ID_PATTERN}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: str = Field(pattern=TENANT_PATTERN)
    scopes: frozenset[Scope] = Field(min_length=1)
    points_per_minute: int | None = Field(default=None, ge=1, le=1_000_000_000)
    burst: int | None = Field(default=None, ge=1, le=1_000_000_000)
    expires: datetime | None = None
    comment: str = Field(default="", max_length=500)

    @field_validator("expires", mode="before")
    @classmethod
    def _read_expires(cls, value: object) -> object:
        if isinstance(value, date) and not isinstance(value, datetime):
            return datetime.combine(value, time(), timezone.utc)
        if isinstance(value, datetime) and value.tzinfo is None:
            raise ValueError("needs a time zone: end it with Z for UTC")
        return value

    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(timezone.utc) >= self.expires


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        tenant: whose caches, label sets and probes are used; "" where there are no keys.
        key: the id of the key, "" where there are none.
        scopes: what may be asked for.
        points_per_minute: as in the keys file; None: not limited.
        burst: what may be spent at once.
    """

    tenant: str = ""
    key: str = ""
    scopes: frozenset[Scope] = frozenset(SCOPES)
    points_per_minute: int | None = None
    burst: int = 0

    @classmethod
    def of(cls, key: Key) -> Caller:
        """The caller that a key stands for."""
        burst = key.burst or key.points_per_minute or 0
        return cls(key.tenant, key.id, key.scopes, key.points_per_minute, burst)


# Whoever asks a service without keys.
ANYBODY = Caller()


def new_secret() -> str:
    """256 random bits as 64 hex digits."""
    return secrets.token_hex(32)


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def parse_keys(text: str) -> dict[str, Key]:
    """Read a keys file; id -> key.

    Raises:
        SettingsInvalid: one line for each fault; nothing of a secret or a hash is in them.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsInvalid(f"not TOML: {error}") from None
    entries = content.get("keys")
    unknown = sorted(set(content) - {"keys"})
    # An empty list says that nobody may come in; an empty file may be one that is still being written.
    if unknown or not isinstance(entries, list):
        what = f"unknown table {unknown[0]!r}" if unknown else "there is no [[keys]] in it, nor `keys = []` for nobody"
        raise SettingsInvalid(f"{what}; `python -m service keys new` prints an entry")
    faults: list[str] = []
    found: dict[str, Key] = {}
    for place, entry in enumerate(entries, start=1):
        try:
            key = Key.model_validate(entry)
        except ValidationError as error:
            faults += [f"key {place}{_named(entry)}: {_fault(item)}" for item in error.errors(include_input=False)]
            continue
        if key.burst is not None and key.points_per_minute is None:
            faults.append(f"key {place}{_named(entry)}: burst needs points_per_minute beside it")
        if key.id in found:
            faults.append(f"key {place}{_named(entry)}: the id is there twice")
        if any(key.sha256 == other.sha256 for other in found.values()):
            faults.append(f"key {place}{_named(entry)}: the sha256 is there twice; a secret belongs to one key")
        found[key.id] = key
    if faults:
        raise SettingsInvalid("\n".join(faults))
    return found


def _named(entry: object) -> str:
    name = entry.get("id") if isinstance(entry, Mapping) else None
    return f" ({name})" if isinstance(name, str) and re.fullmatch(ID_PATTERN, name) else ""


def _fault(item: Any) -> str:
    field = str(item["loc"][0]) if item["loc"] else "entry"
    if item["type"] == "extra_forbidden":
        return f"unknown field {field[:40]!r}; there are: {', '.join(Key.model_fields)}"
    return f"{field}: {str(item['msg']).removeprefix('Value error, ')}"


def read_keys(path: Path) -> dict[str, Key]:
    """Read the keys file.

    Raises:
        SettingsInvalid: it is not there, cannot be read, or has faults.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsInvalid(
            f"{path} cannot be read, it is not there; `python -m service keys new --append FILE` makes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{path} cannot be read ({type(error).__name__})") from None
    try:
        return parse_keys(text)
    except SettingsInvalid as error:
        raise SettingsInvalid("\n".join(f"{path}: {line}" for line in error.detail.splitlines())) from None


class Keyring:
    """The keys of a file, read again when the file changes.

    Args:
        path: the keys file.

    Raises:
        SettingsInvalid: the file cannot be used. Later a file that cannot be used leaves the keys as they were.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _state(path)
        self._keys = _prepared(read_keys(path))
        self._watcher: asyncio.Task[None] | None = None
        self._log = telemetry.get_logger()
        telemetry.KEYS.set(len(self._keys))
        telemetry.KEYS_FILE_OK.set(1)

    def caller(self, token: str) -> Caller:
        """Whose key this is; takes the same way for every key of the right form.

        Raises:
            KeyUnknown: it is not a key, or not one of these.
            KeyExpired: its time is over.
        """
        form = _KEY.fullmatch(token)
        identity, secret = form.groups() if form is not None else ("", "")
        key, wanted, caller = self._keys.get(identity, (None, _NOBODY, ANYBODY))
        same = hmac.compare_digest(digest_of(secret), wanted)
        if key is None or not same:
            raise KeyUnknown("This API key is not known here. It reads ick_ID_SECRET, as `keys new` printed it.")
        if key.expired():
            raise KeyExpired(f"The API key {key.id} has expired; ask for a new one.")
        return caller

    def start(self) -> None:
        """Begin to watch the file."""
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch it no more."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    async def _watch(self) -> None:
        """Look once a second. Not at requests: a stat may hang on a network's file system, and a request must not."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # whatever a file may hold that was not thought of: the watch goes on
                self._log.exception("keys file cannot be read")

    def look(self) -> None:
        """Read the file again if it is another one, or was written to, since it was read."""
        # Taken before the file is read: what is written meanwhile is seen next time.
        state = _state(self.path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._keys = _prepared(read_keys(self.path))
        except SettingsInvalid as error:
            telemetry.KEYS_RELOADS.labels("failed").inc()
            telemetry.KEYS_FILE_OK.set(0)
            self._log.error("keys file cannot be used, the keys stay as they were", reason=error.detail)
            return
        telemetry.KEYS_RELOADS.labels("ok").inc()
        telemetry.KEYS_FILE_OK.set(1)
        telemetry.KEYS.set(len(self._keys))
        self._log.info("keys file read again", keys=len(self._keys))


def _prepared(keys: Mapping[str, Key]) -> dict[str, tuple[Key | None, bytes, Caller]]:
    return {name: (key, bytes.fromhex(key.sha256), Caller.of(key)) for name, key in keys.items()}


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does, or when another takes its place (a mounted Secret swaps a symbolic link)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
