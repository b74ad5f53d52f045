"""From pictures to answers: cache by the bytes' digest, decode, cache by the pixels' digest, encode, decide.

Each picture has its own outcome. What concerns the service (a full queue, a dead worker, a deadline that the queue gave
up) ends the whole request (`service.together.fault_of`), so that one rule holds for one picture and for sixty-four.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ironclip.classifier import Classifier, NativeRule
from ironclip.defences import Defence
from ironclip.encoder import Encoder
from ironclip.errors import ImageError, IronclipError
from ironclip.preprocessing import WARNINGS
from service import telemetry
from service.admission import Room
from service.cache import ArrayCache, KeyScope, image_key
from service.decisions import Classifiers, Plan
from service.decoder import ImageDecoder
from service.forms import Picture
from service.rate_limits import Meter
from service.runtime import ServedEncoder
from service.telemetry import Stages
from service.together import fault_of, together
from service.vectors import Arrays, Schema

Floats = NDArray[np.float32]

_IMAGE_SCHEMA: Schema = {"pixels": ("uint8", (32,)), "warnings": ("uint8", (None,))}
_WARNING_CODES = tuple(WARNINGS)
# Deciding about this many scores is left to a thread, so that it does not hold up other requests.
_THREAD_SCORES = 50_000
# As many numbers of features are normalised in less time than it takes to wake a thread.
_THREAD_NUMBERS = 50_000


@dataclass
class Item:
    """One picture on its way; whichever of the fields are set say how far it has come."""

    picture: Picture
    error: IronclipError | None = None
    pixels: Tensor | None = None
    pixels_digest: bytes = b""
    warnings: list[str] = field(default_factory=list)
    features: Floats | None = None
    vector: Floats | None = None
    scores: Arrays | None = None
    from_cache: bool = False
    resized: bool = False


class Answers:
    """The way of pictures through caches, decoder, batchers and Classifiers.

    Args:
        decoder: bytes to pixels.
        images: cache of what became of the bytes: digest of the pixels, and warnings.
        features: cache of features.
        scores: cache of full score vectors.
        classifiers: the Classifiers by plan.
    """

    def __init__(
        self,
        decoder: ImageDecoder,
        images: ArrayCache,
        features: ArrayCache,
        scores: ArrayCache,
        classifiers: Classifiers,
    ) -> None:
        self.decoder = decoder
        self.images = images
        self.features = features
        self.scores = scores
        self.classifiers = classifiers

    async def classify(
        self, plan: Plan, pictures: Sequence[Picture], stages: Stages, meter: Meter | None = None
    ) -> list[Item]:
        """Decide about each picture; an item has `scores` or `error`.

        Args:
            plan: how.
            pictures: as they came.
            stages: where times go.
            meter: who pays for texts that have to be encoded first; None: nobody.
        """
        items = _items(pictures)
        with stages.time("cache"):
            await self._known_bytes(plan.served, plan.tenant, _open(items))
            await self._known_scores(plan, _open(items))
        waiting = [item for item in _open(items) if item.scores is None]
        if waiting:
            # Before anything is decoded: a request that is refused is to cost next to nothing.
            with plan.served.room_for(len(waiting), plan.defence) as room:
                await self._classify(plan, waiting, stages, room, meter)
        return items

    async def _classify(self, plan: Plan, waiting: list[Item], stages: Stages, room: Room, meter: Meter | None) -> None:
        """Decide about pictures whose bytes, under this plan, are not known."""
        decoded = await self._ready(
            plan.served, plan.tenant, [item for item in waiting if not item.pixels_digest], stages
        )
        with stages.time("cache"):
            await self._known_scores(plan, decoded)
        waiting = [item for item in _open(waiting) if item.scores is None]
        if not waiting:
            return
        classifier = self.classifiers.kept(plan)
        if classifier is None:
            plan.served.images.release(room)  # texts may take long: the pictures are let in anew after them
            with stages.time("labels"):
                classifier = await self._encoded(plan, meter)
        with stages.time("cache"):
            await self._known_features(plan.served, plan.defence, plan.features_key, waiting)
        await self._encode(plan.served, plan.tenant, plan.defence, plan.features_key, waiting, stages, room)
        with stages.time("decide"):
            await self._decide(plan, classifier, _open(waiting))

    async def _encoded(self, plan: Plan, meter: Meter | None) -> Classifier:
        """The plan's Classifier, its texts paid for by whoever is limited."""
        # Apart from what the request costs again and again: encoded once, they are there for the next.
        return await (self.classifiers.get(plan) if meter is None else self.classifiers.bought(plan, meter))

    async def embed(
        self,
        served: ServedEncoder,
        defence: Defence,
        key: bytes,
        pictures: Sequence[Picture],
        stages: Stages,
        plan: Plan | None = None,
        *,
        tenant: str,
        meter: Meter | None = None,
    ) -> list[Item]:
        """A unit vector of each picture; an item has `vector` or `error`.

        Args:
            served: the encoder.
            defence: makes the views, and one vector of theirs.
            key: of the features.
            pictures: as they came.
            stages: where times go.
            plan: the label set, for a defence that reads it.
            tenant: whose caches are used.
            meter: who pays for texts that have to be encoded first; None: nobody.
        """
        classifier = await self._encoded(plan, meter) if plan is not None else None
        items = _items(pictures)
        with stages.time("cache"):
            await self._known_bytes(served, tenant, _open(items))
            await self._known_features(served, defence, key, [item for item in _open(items) if item.pixels_digest])
        waiting = [item for item in _open(items) if item.features is None]
        if waiting:
            with served.room_for(len(waiting), defence) as room:
                decoded = await self._ready(
                    served, tenant, [item for item in waiting if not item.pixels_digest], stages
                )
                with stages.time("cache"):
                    await self._known_features(served, defence, key, decoded)
                await self._encode(served, tenant, defence, key, _open(waiting), stages, room)
        done = [item for item in _open(items) if item.features is not None]
        if done:
            features = torch.from_numpy(np.stack([item.features for item in done if item.features is not None]))
            work = partial(_vectors, served, defence, classifier, features)
            inline = (
                classifier is None and features.numel() <= _THREAD_NUMBERS and not _waits_for_device(served.encoder)
            )
            vectors = work() if inline else await asyncio.to_thread(work)
            for item, vector in zip(done, vectors, strict=True):
                item.vector = vector
        return items

    async def pixels(self, served: ServedEncoder, tenant: str, picture: Picture, stages: Stages) -> Item:
        """A picture as the encoder sees it; raises ImageError."""
        item = Item(picture, picture.error)
        await self._ready(served, tenant, [item], stages)
        if item.error is not None:
            raise item.error
        return item

    async def _known_bytes(self, served: ServedEncoder, tenant: str, items: list[Item]) -> None:
        """Find out from the bytes' digest what the pixels' digest is, without decoding."""
        scope = _image_scope(served, tenant)
        items = [item for item in items if item.pixels is None]
        keys = [image_key(scope, bytes.fromhex(item.picture.digest)) for item in items]
        for item, found in zip(items, await self.images.get_many(keys, _IMAGE_SCHEMA), strict=True):
            if found is not None:
                item.pixels_digest = found["pixels"].tobytes()
                item.warnings = [_WARNING_CODES[i] for i in found["warnings"] if i < len(_WARNING_CODES)]

    async def _known_scores(self, plan: Plan, items: list[Item]) -> None:
        known = [item for item in items if item.pixels_digest]
        keys = [image_key(plan.key, item.pixels_digest) for item in known]
        for item, found in zip(known, await self.scores.get_many(keys, plan.schema), strict=True):
            if found is not None:
                item.scores, item.from_cache = found, True

    async def _known_features(self, served: ServedEncoder, defence: Defence, key: bytes, items: list[Item]) -> None:
        schema: Schema = {"features": ("float32", (defence.view_count, served.encoder.dim))}
        keys = [image_key(key, item.pixels_digest) for item in items]
        for item, found in zip(items, await self.features.get_many(keys, schema), strict=True):
            if found is not None:
                item.features, item.from_cache = found["features"].astype(np.float32, copy=False), True

    async def _ready(self, served: ServedEncoder, tenant: str, items: list[Item], stages: Stages) -> list[Item]:
        """Decode what is not decoded; returns the items that came through."""
        if not items:
            return []
        self.decoder.admit([item.picture.data for item in items])
        with stages.time("decode"):
            await together([self._decode(served, item) for item in items])
        scope = _image_scope(served, tenant)
        done = _open(items)
        for item in done:
            codes = [_WARNING_CODES.index(code) for code in item.warnings]
            arrays: Arrays = {
                "pixels": np.frombuffer(item.pixels_digest, np.uint8),
                "warnings": np.array(codes, np.uint8),
            }
            self.images.put(image_key(scope, bytes.fromhex(item.picture.digest)), arrays)
        return done

    async def _decode(self, served: ServedEncoder, item: Item) -> None:
        picture = item.picture
        try:
            decoded = await self.decoder.decode(picture.data, served.encoder.preprocessing, picture.declared)
        except ImageError as error:
            item.error = error.at(picture.pointer) if picture.pointer else error
            telemetry.DECODE_REJECTS.labels(error.code).inc()
            return
        item.pixels = decoded.pixels
        item.warnings = list(decoded.warnings)
        item.resized = decoded.source_size != (decoded.pixels.shape[2], decoded.pixels.shape[1])
        item.pixels_digest = bytes.fromhex(decoded.digest)

    async def _encode(
        self,
        served: ServedEncoder,
        tenant: str,
        defence: Defence,
        key: bytes,
        items: list[Item],
        stages: Stages,
        room: Room,
    ) -> None:
        """Give each item that has none its features, from the image tower."""
        missing = [item for item in items if item.features is None]
        # The bytes were known but the features have been dropped: the pixels are needed after all.
        await self._ready(served, tenant, [item for item in missing if item.pixels is None], stages)
        missing = _open(missing)
        if not missing:
            return
        with stages.time("model"):
            outcomes = await served.encode_images([_pixels(item) for item in missing], defence, room)
        fault = fault_of(outcomes)
        for item, outcome in zip(missing, outcomes, strict=True):
            if isinstance(outcome, Tensor):  # kept whatever comes of the others: who asks again has less to wait for
                item.features = outcome.numpy()
                self.features.put(image_key(key, item.pixels_digest), {"features": outcome.numpy()})
            elif isinstance(outcome, IronclipError):
                item.error = outcome.at(item.picture.pointer) if item.picture.pointer else outcome
        if fault is not None:
            raise fault

    async def _decide(self, plan: Plan, classifier: Any, items: list[Item]) -> None:
        if not items:
            return
        features = torch.from_numpy(np.stack([item.features for item in items if item.features is not None]))
        many = len(items) * (scores_of(plan) + plan.comparisons) > _THREAD_SCORES
        if many or _waits_for_device(classifier.encoder):
            rows = await asyncio.to_thread(_judge, plan, classifier, features)
        else:
            rows = _judge(plan, classifier, features)
        for item, arrays in zip(items, rows, strict=True):
            item.scores = arrays
            self.scores.put(image_key(plan.key, item.pixels_digest), arrays)


def scores_of(plan: Plan) -> int:
    """Scores of one picture: of the labels, and of every level above them."""
    return len(plan.label_set) + sum(map(len, plan.level_nodes.values()))


def _judge(plan: Plan, classifier: Any, features: Tensor) -> list[Arrays]:
    with torch.no_grad():
        decision = classifier.judge(features.to(classifier.encoder.device))
    columns: dict[str, NDArray[np.generic]] = {
        "logits": decision.logits.cpu().numpy(),
        "cosine": decision.cosine.cpu().numpy(),
    }
    if plan.domain is not None:
        columns["domain"] = plan.domain.score(features[:, 0])[:, None].numpy()
    for name in plan.level_nodes:
        columns[f"level:{name}"] = decision.levels[name].cpu().numpy()
    return [{name: column[i].copy() for name, column in columns.items()} for i in range(len(features))]


def _vectors(
    served: ServedEncoder, defence: Defence, classifier: Classifier | None, features: Tensor
) -> NDArray[np.float32]:
    with torch.no_grad():
        features = features.to(served.encoder.device)
        if classifier is not None:
            found = classifier.vectors(features)
        else:
            found = defence.vector(features, None, None, NativeRule(served.encoder))
    vectors: NDArray[np.float32] = found.cpu().numpy()
    return vectors


def _waits_for_device(encoder: Encoder) -> bool:
    """Whether arithmetic there waits for the batch that runs, and the event loop would wait with it: on a GPU."""
    return encoder.device.type != "cpu"


def _image_scope(served: ServedEncoder, tenant: str) -> bytes:
    return KeyScope("", "", served.encoder.preprocessing.digest, "image", tenant=tenant).digest()


def _items(pictures: Sequence[Picture]) -> list[Item]:
    """Those that came as pixels are past decoding, and are no file: the cache of files never hears of them."""
    return [
        Item(picture, picture.error, pixels=picture.pixels, pixels_digest=picture.pixels_digest) for picture in pictures
    ]


def _open(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.error is None]


def _pixels(item: Item) -> Tensor:
    assert item.pixels is not None
    return item.pixels
