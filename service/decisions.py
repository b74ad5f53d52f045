"""What a classification needs besides pictures: a plan (names, keys), and the Classifier behind it, made once.

A plan is cheap and enough to answer from the cache; the Classifier needs the label set's text bank, which is
encoded once for each label set however many requests want it at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from cachetools import LRUCache

from ironclip.classifier import Classifier, LevelMode, bind_levels, level_label_sets
from ironclip.defences import Defence
from ironclip.domain import Domain
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from ironclip.textbank import TextBank
from service import telemetry
from service.banks import prompts_of
from service.cache import ArrayCache, KeyScope
from service.label_sets import Trees, tree_digest
from service.rate_limits import TEXT, Meter
from service.runtime import ServedEncoder
from service.single_flight import SingleFlight
from service.vectors import Arrays, Schema

T = TypeVar("T")

_MOST_UNPAID = 1024

_BANK_SCHEMA: Schema = {
    "weights": ("float32", (None, None)),
    "norms": ("float32", (None,)),
    "texts": ("float32", (None, None)),
    "rows": ("int64", (None,)),
    "counts": ("int64", (None, None)),
    "blank": ("float32", (None,)),
}


@dataclass(frozen=True)
class Plan:
    """One way to decide about pictures.

    Attributes:
        served: the encoder.
        label_set: resolved with the encoder's templates.
        tree: a label tree, or several by name.
        levels: how its upper levels are scored.
        defence: what stands in the decision.
        reference: what the answer says of the label set.
        tenant: whose it is. Nothing made for one tenant is used for another, text banks included: that an answer comes
            sooner would tell one tenant which labels and pictures another has asked for.
    """

    served: ServedEncoder
    label_set: LabelSet
    tree: Trees | None
    levels: LevelMode
    defence: Defence
    reference: Mapping[str, str] = field(compare=False)
    tenant: str = ""

    @property
    def domain(self) -> Domain | None:
        """What the encoder was trained on, if its artifact says so."""
        return self.served.domain

    @cached_property
    def encoder_form(self) -> dict[str, str]:
        """Which encoder answers, for answers."""
        return encoder_reference(self.served)

    @cached_property
    def level_nodes(self) -> dict[str, tuple[str, ...]]:
        """Every level above the labels: name -> its nodes, in the order of their scores."""
        if self.tree is None:
            return {}
        levels = bind_levels(self.tree, self.label_set)
        return {name: level.nodes for name, level in levels.items() if level.nodes != self.label_set.names}

    @cached_property
    def defence_form(self) -> dict[str, Any]:
        """The defence with all its options, for answers and keys."""
        return {"name": self.defence.name, **self.defence.options()}

    @cached_property
    def comparisons(self) -> int:
        """Work of deciding one picture beside the forwards, see `Defence.comparisons`."""
        return self.defence.comparisons(*self.table)

    @cached_property
    def table(self) -> tuple[int, int]:
        """Labels (and nodes that are scored by prompts) that one decision compares with, and most texts of any."""
        per_label = max(len(self.label_set.templates), 1)
        longest = max((len(label.prompts) or per_label) + len(label.descriptions) for label in self.label_set.labels)
        labels = len(self.label_set)
        if self.levels == "prompts" and self.tree is not None:
            labels += sum(map(len, self.level_nodes.values()))
            trees = [self.tree] if isinstance(self.tree, LabelTree) else list(self.tree.values())
            longest = max([longest, *(len(texts) for tree in trees for texts in tree.prompts.values())])
        return labels, longest

    @cached_property
    def key(self) -> bytes:
        """Digest of everything that decides the scores except the picture."""
        return self.scope(f"classify+{domain_digest(self.domain)}").digest()

    @cached_property
    def prepared_key(self) -> bytes:
        """Digest of everything that a Classifier is made of: plans that differ in their draws alone share one."""
        prepared = self.defence.preparation()
        form = {"name": prepared.name, **prepared.options()}
        return replace(self.scope("classifier"), defence=form).digest()

    @cached_property
    def features_key(self) -> bytes:
        """Digest of everything that decides the features except the picture."""
        return feature_scope(self.served.identity, self.defence_form, self.tenant)

    @cached_property
    def schema(self) -> Schema:
        """Form of the cached scores of one picture."""
        labels = len(self.label_set)
        levels = {f"level:{name}": ("float32", (len(nodes),)) for name, nodes in self.level_nodes.items()}
        domain: Schema = {"domain": ("float32", (1,))} if self.domain is not None else {}
        return {"logits": ("float32", (labels,)), "cosine": ("float32", (labels,)), **levels, **domain}

    def scope(self, operation: str) -> KeyScope:
        """The key's fields for one operation."""
        encoder = self.served.encoder
        return KeyScope(
            encoder=self.served.digest,
            dtype=self.served.dtype,
            preprocessing=encoder.preprocessing.digest,
            operation=operation,
            label_set=self.label_set.digest,
            tree=tree_digest(self.tree),
            levels=self.levels if self.tree is not None else "",
            defence=self.defence_form,
            tenant=self.tenant,
        )


def domain_digest(domain: Domain | None) -> str:
    """SHA-256 (hex) of what decides a domain score; the encoder's own digest does not cover it. "" for none."""
    if domain is None:
        return ""
    digest = hashlib.sha256()
    for tensor in (domain.means, domain.whitening):
        digest.update(f"{tuple(tensor.shape)};".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_reference(served: ServedEncoder) -> dict[str, str]:
    """What every answer says of the encoder that gave it."""
    encoder = served.encoder
    return {"name": served.name, "digest": served.digest, "dtype": served.dtype, "head": encoder.head.type}


def feature_scope(identity: tuple[str, str, str], defence: Mapping[str, Any], tenant: str) -> bytes:
    """Digest of everything that decides a picture's features (of all its views) except the picture.

    `identity` is the encoder's, see `ServedEncoder.identity`.
    """
    digest, dtype, preprocessing = identity
    scope = KeyScope(
        encoder=digest,
        dtype=dtype,
        preprocessing=preprocessing,
        operation="features",
        defence=defence,
        tenant=tenant,
    )
    return scope.digest()


class Classifiers:
    """Keeps the Classifiers of recent plans, and the text banks under them.

    Args:
        banks: the cache of text banks, shared by the replicas where there is a Redis.
        max_bytes: memory for Classifiers; the newest is kept even if it takes more alone, else every request would make
            it anew. 0: none is kept.
    """

    def __init__(self, banks: ArrayCache, max_bytes: int) -> None:
        self._banks = banks
        self._kept: LRUCache[bytes, Classifier] = LRUCache(max(max_bytes, 1), getsizeof=_size)
        self._max_bytes = max_bytes
        self._large: tuple[bytes, Classifier] | None = None
        self._flight = SingleFlight()
        # Banks that have been encoded and that nobody has paid for yet.
        self._unpaid: LRUCache[bytes, bool] = LRUCache(_MOST_UNPAID)

    def kept(self, plan: Plan) -> Classifier | None:
        """The plan's Classifier if it is there already."""
        found = self._find(plan.prepared_key)
        return None if found is None else found.under(plan.defence)

    async def get(self, plan: Plan) -> Classifier:
        """The plan's Classifier.

        Raises:
            LabelError, TreeError, OptionError: as the library says.
            Overloaded, NotReady: as `ServedEncoder.text_bank`.
        """
        kept = self.kept(plan)
        if kept is not None:
            return kept
        made = await self._flight.run(plan.prepared_key, lambda: self._make(plan))
        return made.under(plan.defence)

    async def bought(self, plan: Plan, meter: Meter) -> Classifier:
        """`get`, its texts paid for by whoever is limited; of all who wait for the same ones a single one pays.

        All of them pay first, and it is whoever has the texts first that does not get it back: who asked for them first
        may be refused, and what comes of the others would cost nobody anything.

        Raises:
            As `get` and `Meter.pay`.
        """
        if not meter.limited:
            return await self.get(plan)
        missing = await self._missing(plan)
        async with meter.paid(TEXT * sum(missing.values()), again=False) as store:
            found = await self.get(plan)
            others = [texts for key, texts in missing.items() if not self._unpaid.pop(key, False)]
            await meter.give_back(TEXT * sum(others), store, again=False)
        return found

    async def attacked(self, plan: Plan) -> tuple[Classifier, Classifier]:
        """The plan's Classifier, and the same over the float32 encoder that gradients are taken of.

        Raises:
            As `get`.
        """
        served = await self.get(plan)
        encoder = plan.served.attacked
        if encoder is served.encoder:
            return served, served
        return served, await asyncio.to_thread(served.over, encoder)

    async def texts_to_encode(self, plan: Plan) -> int:
        """How many texts `get` has to encode now; 0 if all are there."""
        return sum((await self._missing(plan)).values())

    def forget(self, served: ServedEncoder) -> None:
        """Let go of what holds an encoder that has been unloaded."""
        encoders = (served.encoder, served.attacked)
        for key in [key for key, kept in self._kept.items() if any(kept.encoder is one for one in encoders)]:
            del self._kept[key]
        if self._large is not None and any(self._large[1].encoder is one for one in encoders):
            self._large = None
        self._told()

    def _find(self, key: bytes) -> Classifier | None:
        if self._large is not None and self._large[0] == key:
            return self._large[1]
        found: Classifier | None = self._kept.get(key)
        return found

    def _keep(self, key: bytes, classifier: Classifier, plan: Plan) -> None:
        if plan.served.retired or not self._max_bytes:
            return
        if _size(classifier) <= self._max_bytes:
            self._kept[key] = classifier
        else:
            self._large = (key, classifier)
        self._told()

    def _told(self) -> None:
        large = 0 if self._large is None else _size(self._large[1])
        telemetry.CACHE_BYTES.labels("classifiers").set(self._kept.currsize + large)

    async def _make(self, plan: Plan) -> Classifier:
        # Before anything is encoded: it may be too much.
        level_sets = await self._level_sets(plan)
        bank = await self._bank(plan, plan.label_set)
        level_banks = {name: await self._bank(plan, level_set) for name, level_set in level_sets.items()}
        classifier = await asyncio.to_thread(
            Classifier,
            plan.served.encoder,
            plan.label_set,
            bank,
            tree=plan.tree,
            levels=plan.levels,
            level_banks=level_banks,
            defence=plan.defence,
        )
        self._keep(plan.prepared_key, classifier, plan)
        return classifier

    async def _missing(self, plan: Plan) -> dict[bytes, int]:
        """The banks that `get` has to encode now by their keys, and how many texts each has."""
        if self._find(plan.prepared_key) is not None:
            return {}
        missing = {}
        for label_set in [plan.label_set, *(await self._level_sets(plan)).values()]:
            if await self._stored(plan, label_set) is None:
                missing[_bank_key(plan, label_set)] = prompts_of(label_set, plan.defence.reads_descriptions)
        return missing

    async def _level_sets(self, plan: Plan) -> dict[str, LabelSet]:
        """The nodes of the levels that are scored by prompts of their own, as label sets."""
        if plan.tree is None or plan.levels != "prompts":
            return {}
        found = await asyncio.to_thread(level_label_sets, plan.tree, plan.label_set)
        return {name: one.resolve(plan.served.encoder) for name, one in found.items()}

    async def _bank(self, plan: Plan, label_set: LabelSet) -> TextBank:
        found = await self._stored(plan, label_set)
        if found is not None:
            about = (plan.served.digest, label_set.digest, plan.defence.reads_descriptions)
            return await asyncio.to_thread(_to_bank, *about, found)
        key = _bank_key(plan, label_set)
        return await self._flight.run(key, lambda: self._build(key, plan, label_set))

    async def _stored(self, plan: Plan, label_set: LabelSet) -> Arrays | None:
        """What the cache has of a bank, if it can be one of this label set."""
        found = await self._banks.get(_bank_key(plan, label_set), _BANK_SCHEMA)
        return found if found is not None and _fits(found, label_set, plan.served.encoder.dim) else None

    async def _build(self, key: bytes, plan: Plan, label_set: LabelSet) -> TextBank:
        descriptions = plan.defence.reads_descriptions
        bank = await plan.served.text_bank(label_set, descriptions=descriptions, tenant=plan.tenant)
        self._unpaid[key] = True
        self._banks.put(key, await asyncio.to_thread(_from_bank, bank))  # from a GPU: behind the batch that runs
        return bank


def _bank_key(plan: Plan, label_set: LabelSet) -> bytes:
    scope = KeyScope(
        encoder=plan.served.digest,
        dtype=plan.served.dtype,
        preprocessing="",
        operation="text-bank-2+descriptions" if plan.defence.reads_descriptions else "text-bank-2",
        label_set=label_set.digest,
        tenant=plan.tenant,
    )
    return scope.digest()


def _fits(arrays: Arrays, label_set: LabelSet, dim: int) -> bool:
    """Whether a stored bank can be one of this label set: its indices are used without further checks."""
    rows, counts = arrays["rows"].astype(np.int64, copy=False), arrays["counts"].astype(np.int64, copy=False)
    texts = arrays["texts"]
    return bool(
        arrays["weights"].shape == (len(label_set), dim)
        and arrays["norms"].shape == (len(label_set),)
        and texts.shape[1] == dim
        and counts.shape == (len(label_set), 2)
        and (counts >= 0).all()
        and int(counts.sum()) == len(rows)
        and len(rows) > 0
        and rows.min() >= 0
        and rows.max() < len(texts)
        and arrays["blank"].shape == (dim,)
    )


def _to_bank(encoder: str, label_set: str, descriptions: bool, arrays: Arrays) -> TextBank:
    # Copied: what comes out of the cache is read-only memory, which torch tensors must not share.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return TextBank(encoder, label_set, descriptions, **tensors)


def _from_bank(bank: TextBank) -> Arrays:
    return {name: getattr(bank, name).cpu().numpy() for name in _BANK_SCHEMA}


def _size(classifier: Classifier) -> int:
    return 4096 + classifier.label_bytes
