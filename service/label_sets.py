"""Registered label sets: named, versioned by digest, the same on every replica within a second.

A set is `{"labels", "templates"?, "tree"?}`. Its digest is that of its canonical form and serves as ETag and as
version: `name` is the newest, `name@digest` one of the last few. The sets that ship with the package are always
there and read-only. Where sets are kept is the business of a `Store` (`label_stores.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from ironclip.errors import LabelError, LabelSetNotFound, TreeError, Unavailable
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelLimits, LabelSet
from service.errors import LabelSetReadOnly
from service.label_stores import Expect, Store, StoreDown, UnsignedSet
from service.settings import NAME_PATTERN
from service.single_flight import SingleFlight

Trees = LabelTree | Mapping[str, LabelTree]

# For so long a replica answers from what it last saw before it asks the store again.
_FRESH_SECONDS = 0.5
# Threads that take documents apart at once: all other work that is done beside the loop shares its threads with them.
_PARSERS = 2
# Sets kept as objects, by a guess at their size: an object is some ten times its JSON.
_PARSED_BYTES = 256 * 1024 * 1024
_JSON_TO_OBJECT = 10
_KEYS = {"labels", "templates", "tree"}


@dataclass(frozen=True)
class Registered:
    """One version of a registered label set."""

    name: str
    digest: str
    label_set: LabelSet
    tree: Trees | None
    read_only: bool = False

    def document(self) -> dict[str, Any]:
        """The canonical form: what `GET` answers and what the store keeps."""
        form = self.label_set.canonical()
        if self.tree is not None:
            form["tree"] = tree_json(self.tree)
        return form


def parse_document(
    name: str, content: object, limits: LabelLimits | None = None, *, read_only: bool = False
) -> Registered:
    """Check a label set as it was sent or stored, and bring it into canonical form.

    Raises:
        LabelError, TreeError: with a pointer to the fault.
    """
    if not isinstance(content, Mapping) or "labels" not in content:
        raise LabelError('A label set is {"labels": [...], "templates"?: [...], "tree"?: {...}}.')
    unknown = sorted(str(key) for key in set(content) - _KEYS)
    if unknown:
        raise LabelError(f"Unknown key in the label set: {unknown[0][:60]!r}.")
    label_set = LabelSet.parse(content["labels"], content.get("templates"), limits=limits)
    tree = parse_tree(content["tree"]) if content.get("tree") is not None else None
    if tree is not None:
        for one in [tree] if isinstance(tree, LabelTree) else tree.values():
            one.bind(label_set.names)
    digest = label_set.digest
    if tree is not None:
        digest = hashlib.sha256(f"{digest}:{tree_digest(tree)}".encode()).hexdigest()
    return Registered(name, digest, label_set, tree, read_only)


def parse_tree(source: object, pointer: str = "/tree") -> Trees:
    """Read one tree, or several by name: `{name: tree}`.

    Raises:
        TreeError: with a pointer to the fault.
    """
    if isinstance(source, Mapping) and "parents" not in source and "levels" not in source:
        if not source or len(source) > 16:
            raise TreeError("Give one tree, or between 1 and 16 trees by name.", pointer=pointer)
        for name in source:
            if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
                raise TreeError(f"A tree's name is to match {NAME_PATTERN}.", pointer=pointer)
        return {name: LabelTree.parse(tree, pointer=f"{pointer}/{name}") for name, tree in sorted(source.items())}
    return LabelTree.parse(source, pointer=pointer)


def tree_digest(tree: Trees | None) -> str:
    """SHA-256 (hex) of a tree or of trees by name; "" for none."""
    if tree is None:
        return ""
    if isinstance(tree, LabelTree):
        return tree.digest
    form = {name: one.digest for name, one in tree.items()}
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


def tree_json(tree: Trees) -> dict[str, Any]:
    """The JSON form that `parse_tree` reads back."""
    if not isinstance(tree, LabelTree):
        return {name: tree_json(one) for name, one in tree.items()}
    form: dict[str, Any] = {"parents": dict(tree.parents)}
    if tree.levels:
        form["levels"] = list(tree.levels)
    if tree.prompts:
        form["prompts"] = {node: list(texts) for node, texts in tree.prompts.items()}
    return form


def load_built_in(folder: Path, trees: Path | None = None) -> dict[str, Registered]:
    """The label sets that ship with the package, by name (the file's stem), each with the tree of its name."""
    sets = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = {key: value for key, value in content.items() if key in _KEYS}
        tree = trees / path.name if trees is not None else None
        if tree is not None and tree.is_file():
            wanted["tree"] = json.loads(tree.read_text(encoding="utf-8"))
        sets[path.stem] = parse_document(path.stem, wanted, read_only=True)
    return sets


class LabelSets:
    """Label sets by name, over a store.

    Args:
        store: where registered sets are kept.
        built_in: read-only sets.
        limits: what a registered set may hold.
    """

    def __init__(self, store: Store, built_in: Mapping[str, Registered], limits: LabelLimits) -> None:
        self.store = store
        self.built_in = dict(built_in)
        self.limits = limits
        # By tenant too, so that one learns nothing of what another has.
        self._parsed: LRUCache[tuple[str, str, str], tuple[Registered, int]] = LRUCache(
            _PARSED_BYTES, getsizeof=lambda entry: entry[1]
        )
        self._heads: LRUCache[tuple[str, str], tuple[float, str]] = LRUCache(4096)
        self._changes = 0  # of sets, by this replica
        self._parsing = asyncio.Semaphore(_PARSERS)
        self._loading = SingleFlight()

    async def get(self, reference: str, *, fresh: bool = False, tenant: str = "") -> Registered:
        """The tenant's set of this `name` or `name@digest`; `fresh` asks the store even if it was asked just now.

        Raises:
            LabelSetNotFound: no such set, or not in this version.
            Unavailable: the store does not answer and this replica has not seen the set.
        """
        name, _, pinned = reference.partition("@")
        if not re.fullmatch(NAME_PATTERN, name) or (pinned and not re.fullmatch(r"[0-9a-f]{64}", pinned)):
            raise LabelSetNotFound(f"A label set is named by {NAME_PATTERN}, or by name@digest.")
        built_in = self.built_in.get(name)
        if built_in is not None:
            if pinned and pinned != built_in.digest:
                raise LabelSetNotFound(f"The label set {name!r} ships with the service, in one version.")
            return built_in
        # A pinned version goes with its set: where the name is gone, so is the version.
        newest = await self._head(tenant, name, fresh)
        digest = pinned or newest
        known = self._parsed.get((tenant, name, digest))
        if known is not None:
            return known[0]
        load = partial(self._load, tenant, name, digest, pinned=bool(pinned))
        return await self._loading.run((tenant, name, digest, bool(pinned)), load)

    async def put(self, name: str, content: object, expect: Expect, *, tenant: str = "") -> tuple[Registered, bool]:
        """Register a version as the newest; returns it, and whether the name is new.

        Raises:
            LabelError, TreeError: the set cannot be used.
            Conflict: `expect` is not met; LabelSetReadOnly: the set ships with the service.
            Unavailable: the store does not answer.
        """
        self._refuse_built_in(name)
        async with self._parsing:
            entry, document = await asyncio.to_thread(_parse_and_dump, name, content, self.limits)
        changes = self._changes
        try:
            created = await self.store.of(tenant).put(name, entry.digest, document, expect)
        except StoreDown as error:
            raise _unavailable(error) from error
        self._remember(tenant, entry, len(document))
        if changes == self._changes:
            self._heads[tenant, name] = (time.monotonic(), entry.digest)
        else:  # which of two changes came last, only the store knows
            self._heads.pop((tenant, name), None)
        self._changes += 1
        return entry, created

    async def delete(self, name: str, expect: Expect, *, tenant: str = "") -> None:
        """Remove a set with all its versions; raises as `put` does, and LabelSetNotFound."""
        self._refuse_built_in(name)
        try:
            found = await self.store.of(tenant).delete(name, expect)
        except StoreDown as error:
            raise _unavailable(error) from error
        self._changes += 1
        self._forget(tenant, name)
        if not found:
            raise _missing()

    async def names(self, *, tenant: str = "") -> list[tuple[str, str, bool]]:
        """(name, digest, read-only) of every set of the tenant and of all, sorted by name.

        Raises:
            Unavailable: the store does not answer.
        """
        try:
            stored = await self.store.of(tenant).heads()
        except StoreDown as error:
            raise _unavailable(error) from error
        shipped = [(name, entry.digest, True) for name, entry in self.built_in.items()]
        mine = [(name, digest, False) for name, digest in stored.items() if name not in self.built_in]
        return sorted(shipped + mine)

    async def _head(self, tenant: str, name: str, fresh: bool) -> str:
        seen, now, changes = self._heads.get((tenant, name)), time.monotonic(), self._changes
        if seen is not None and not fresh and now - seen[0] < _FRESH_SECONDS:
            return seen[1]
        try:
            digest = await self.store.of(tenant).head(name)
        except StoreDown as error:
            if seen is not None:
                return seen[1]  # the store is down: the version last seen here is better than none
            raise _unavailable(error) from error
        # What was read before this replica put or deleted a set is not to be kept in the place of what it knows since.
        current = changes == self._changes
        if digest is None:
            if current:
                self._forget(tenant, name)
            raise _missing()
        if current:
            self._heads[tenant, name] = (now, digest)
        return digest

    async def _load(self, tenant: str, name: str, digest: str, *, pinned: bool) -> Registered:
        try:
            document = await self.store.of(tenant).load(name, digest)
        except StoreDown as error:
            raise _unavailable(error) from error
        if document is None:
            self._parsed.pop((tenant, name, digest), None)
            if pinned:
                raise LabelSetNotFound(
                    "This label set is not, or no longer, kept in this version; its newest versions are."
                )
            raise _missing()
        try:
            entry = await asyncio.to_thread(_parse_stored, name, document, self.limits)
        except (ValueError, LabelError, TreeError) as error:
            raise Unavailable(f"The stored label set {name!r} cannot be read; put it again.", retry_after=60) from error
        if entry.digest != digest:
            raise Unavailable(f"The stored label set {name!r} is not the one registered; put it again.", retry_after=60)
        self._remember(tenant, entry, len(document))
        return entry

    def _remember(self, tenant: str, entry: Registered, size: int) -> None:
        cost = _JSON_TO_OBJECT * size
        if cost <= _PARSED_BYTES:
            self._parsed[tenant, entry.name, entry.digest] = (entry, cost)

    def _forget(self, tenant: str, name: str) -> None:
        self._heads.pop((tenant, name), None)
        for key in [key for key in self._parsed if key[:2] == (tenant, name)]:
            del self._parsed[key]

    def _refuse_built_in(self, name: str) -> None:
        if not re.fullmatch(NAME_PATTERN, name):
            raise LabelError(f"A label set's name is to match {NAME_PATTERN}.")
        if name in self.built_in:
            raise LabelSetReadOnly(f"The label set {name!r} ships with the service; use another name.")


def _parse_and_dump(name: str, content: object, limits: LabelLimits) -> tuple[Registered, bytes]:
    entry = parse_document(name, content, limits)
    return entry, json.dumps(entry.document(), ensure_ascii=False).encode()


def _parse_stored(name: str, document: bytes, limits: LabelLimits) -> Registered:
    return parse_document(name, json.loads(document), limits)


def _missing() -> LabelSetNotFound:
    return LabelSetNotFound("No label set is registered under this name; GET /label-sets lists them.")


def _unavailable(error: StoreDown) -> Unavailable:
    if isinstance(error, UnsignedSet):
        return Unavailable(f"The stored label set is not used: {error}", retry_after=60)
    return Unavailable(f"Label sets cannot be reached: {error}", retry_after=1)
