"""From the options of a classification to its plan: the key it is kept under, its making, and what keeping it costs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from sys import getsizeof
from typing import Any

from cachetools import LRUCache
from pydantic_core import to_json

from ironclip.classifier import LevelMode
from ironclip.defences import Defence, make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError, TreeError
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelLimits, LabelSet
from service.answers import scores_of
from service.decisions import Plan
from service.errors import RequestInvalid
from service.label_sets import Registered, Trees, parse_tree
from service.runtime import ServedEncoder
from service.schemas import Options

# Plans kept, by what they hold of memory; and what is too much to be taken apart on the event loop.
_PLAN_BYTES = 128 * 1024 * 1024
# Plans of many labels that are made at once.
_MAKERS = 2
_LARGE_BYTES = 100_000
_LARGE_SET = 2000
# Levels of all trees of one request: each costs scores for every picture and a list in every answer.
_MAX_LEVELS = 64
# What an object holds beside its texts: a label, an edge of a tree, a node of a level.
_LABEL_BYTES, _EDGE_BYTES, _NODE_BYTES = 300, 300, 16


class Plans:
    """Makes plans, and keeps the recent ones.

    Args:
        limits: for labels that come with the request.
        most_views: what a defence may cost, in forwards of the image tower.
    """

    def __init__(self, limits: LabelLimits, most_views: int) -> None:
        self.limits = limits
        self.most_views = most_views
        self._kept: LRUCache[bytes, tuple[Plan, int]] = LRUCache(_PLAN_BYTES, getsizeof=lambda entry: entry[1])
        # All other work that is done beside the loop shares its threads with these.
        self._making = asyncio.Semaphore(_MAKERS)

    @property
    def bytes_kept(self) -> int:
        """Memory of the plans kept, as far as it is counted."""
        return int(self._kept.currsize)

    async def get(
        self,
        served: ServedEncoder,
        options: Options,
        entry: Registered | None,
        size: int,
        tenant: str = "",
    ) -> Plan:
        """The plan for these options.

        Args:
            served: the encoder that the options name.
            options: what is asked for.
            entry: the registered set that the options name, or None where they hold the labels.
            size: bytes of the options as they came.
            tenant: whose plan it is: that it is known already would tell another tenant of it.

        Raises:
            IronclipError: an option, the labels or the tree cannot be used.
        """
        long = size > _LARGE_BYTES
        ask = (served, options, entry, tenant)
        key = await asyncio.to_thread(plan_key, *ask) if long else plan_key(*ask)
        kept = self._kept.get(key)
        if kept is not None:
            return kept[0]
        make = (served, options, entry, tenant)
        large = long or (entry is not None and len(entry.label_set) + _edges(entry.tree) > _LARGE_SET)
        if large:
            async with self._making:
                plan, cost = await asyncio.to_thread(self._make, *make)
        else:
            plan, cost = self._make(*make)
        if cost <= _PLAN_BYTES and not served.retired:
            self._kept[key] = (plan, cost)
        return plan

    def forget(self, served: ServedEncoder) -> None:
        """Let go of the plans of an encoder that has been unloaded."""
        for key in [key for key, (plan, _) in self._kept.items() if plan.served is served]:
            del self._kept[key]

    def defence(self, served: ServedEncoder, value: dict[str, Any] | str | None) -> Defence:
        """What a request asks for, or the encoder's own defence.

        Raises:
            OptionError: it does not exist, its options are wrong, it costs too much, or it does not serve this head.
        """
        if value is None:
            return served.defence
        defence = self.checked(parse_defence(value))
        check_head(defence, served.encoder, served.name)
        return defence

    def checked(self, defence: Defence) -> Defence:
        """The defence, if it does not cost too much; else OptionError."""
        if defence.cost > self.most_views:
            raise OptionError(
                f"The defence costs {defence.cost} forwards of the image tower for each picture, at most "
                f"{self.most_views} are allowed here (IRONCLIP_MAX_VIEWS); ask for fewer views or steps.",
                pointer="/defence",
                limit=self.most_views,
            )
        return defence

    def _make(self, served: ServedEncoder, options: Options, entry: Registered | None, tenant: str) -> tuple[Plan, int]:
        defence = self.defence(served, options.defence)
        tree: Trees | None = parse_tree(options.tree) if options.tree is not None else None
        if entry is None:
            label_set = LabelSet.parse(options.labels, options.templates, limits=self.limits)
            reference = {"digest": label_set.digest}
        else:
            label_set = entry.label_set
            reference = {"name": entry.name, "digest": entry.digest}
            if options.templates is not None:
                label_set = label_set.with_templates(options.templates)
            if tree is None and options.levels is not None:
                tree = entry.tree
        if options.levels is not None and tree is None:
            raise OptionError("levels needs a tree, or a label set registered with one.", pointer="/levels")
        _check_levels(sum(len(one.levels) for one in _each(tree)))
        levels: LevelMode = options.levels or "rollup"
        plan = Plan(served, label_set.resolve(served.encoder), tree, levels, defence, reference, tenant)
        # A tree that does not fit the labels is an error of this request, told at once.
        _check_levels(len(plan.level_nodes))
        _ = plan.key  # made here, where large sets have a thread: it takes the digests of all labels and edges
        return plan, plan_bytes(plan)


def plan_key(served: ServedEncoder, options: Options, entry: Registered | None, tenant: str = "") -> bytes:
    """Digest of all that decides a plan; raises RequestInvalid for what cannot be written as JSON."""
    # Tagged, so that two labels that read like a set's name and digest are not taken for the set.
    labels = ["set", entry.name, entry.digest] if entry is not None else ["labels", options.labels]
    try:
        decision = [labels, options.templates, options.tree, options.levels, options.defence]
        asked = to_json([tenant, served.serial, *decision])
    except ValueError:  # PydanticSerializationError is one
        raise RequestInvalid("The options hold text that is not Unicode, or are nested too deep.") from None
    return hashlib.sha256(asked).digest()


def plan_bytes(plan: Plan) -> int:
    """Memory that a plan keeps alive, by a guess: also a registered set's, which may be replaced meanwhile."""
    size = 4096 + sum(map(getsizeof, plan.label_set.templates))
    for label in plan.label_set.labels:
        size += _LABEL_BYTES + getsizeof(label.name)
        size += sum(map(getsizeof, label.prompts)) + sum(map(getsizeof, label.descriptions))
    for tree in _each(plan.tree):
        size += sum(_EDGE_BYTES + getsizeof(child) for child in tree.parents)
        size += sum(getsizeof(text) for texts in tree.prompts.values() for text in texts)
    return size + _NODE_BYTES * scores_of(plan)


def parse_defence(value: dict[str, Any] | str) -> Defence:
    """Read `{"name": ..., option: ...}` or a bare name; raises OptionError listing what exists."""
    if isinstance(value, str):
        return make_defence(value)
    name = value.get("name")
    if not isinstance(name, str):
        raise OptionError('A defence is {"name": ..., option: ...} or a bare name.', pointer="/defence/name")
    options = {key: option for key, option in value.items() if key != "name"}
    if len(json.dumps(options)) > 4096:
        raise OptionError("The defence's options are too large.", pointer="/defence")
    return make_defence(name, options)


def check_head(defence: Defence, encoder: Encoder, name: str) -> None:
    """Raise OptionError for a defence that does not serve the encoder's head."""
    head = encoder.head.type
    if head not in defence.heads:
        raise OptionError(
            f"The defence {defence.name!r} serves encoders with a {' or '.join(defence.heads)} head; the head of "
            f"{name!r} is {head}.",
            pointer="/defence",
        )


def _check_levels(count: int) -> None:
    if count > _MAX_LEVELS:
        raise TreeError(
            f"The trees have {count} levels together, at most {_MAX_LEVELS} are allowed in one request.",
            pointer="/tree",
            limit=_MAX_LEVELS,
        )


def _each(tree: Trees | None) -> list[LabelTree]:
    if tree is None:
        return []
    return [tree] if isinstance(tree, LabelTree) else list(tree.values())


def _edges(tree: Trees | None) -> int:
    return sum(len(one.parents) for one in _each(tree))
