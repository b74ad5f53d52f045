"""`POST /classify`: which of the caller's labels fits the picture."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from ironclip.domain import Domain
from ironclip.errors import InputTooLarge, OptionError
from service.answers import Item, scores_of
from service.decisions import Plan
from service.forms import Picture, read_ask
from service.problems import problem
from service.rate_limits import reading
from service.routes.common import (
    Deadline,
    fetched,
    json_response,
    meter_of,
    price_of,
    service_of,
    spared_of,
    stages_of,
)
from service.routes.remembering import remember
from service.schemas import ClassifyRequest, Options

router = APIRouter(tags=["inference"])

DEFAULT_TOP_K = 100
# Bounds on one request: predictions in its answer, and scores to take them from, over all images and levels.
_MAX_PREDICTIONS = 200_000
_MAX_SCORES = 20_000_000
# What deciding through a defence may cost beside the forwards: some 20 seconds of one core.
_MAX_COMPARISONS = 20_000_000_000
# Views times labels times the most texts of any: what is held for one picture, four bytes each and a few times over.
_MAX_COSTS = 50_000_000
# Writing this many predictions is left to a thread, so that it does not hold up other requests; a score that is only
# sorted counts as a fiftieth of one that is written.
_THREAD_PREDICTIONS = 2000
_SCORES_PER_PREDICTION = 50


@router.post("/classify", operation_id="classify", summary="Classify pictures among labels")
async def classify(request: Request) -> Response:
    """Zero-shot classification with the caller's own labels, or with a registered label set.

    Send JSON, a multipart form (`image` as a file, `labels` repeated), or the bare image with the options as
    query parameters. With `image` the answer is one object, with `images` a list of objects in the same order,
    in which an image that cannot be used has `{"error": problem}` in its place.
    """
    service, stages, meter = service_of(request), stages_of(request), meter_of(request)
    deadline = Deadline.of(request)
    async with deadline.receiving():
        ask = await read_ask(request, ClassifyRequest, Options, service.image_limits, service.settings.max_images)
    top_k = ask.options.top_k or DEFAULT_TOP_K

    async def work() -> tuple[Plan, list[Item]]:
        if ask.single and ask.pictures[0].error is not None:
            raise ask.pictures[0].error
        await meter.pay(reading(ask.size))  # also for labels that then turn out to be none
        plan = await service.plan(ask.options, ask.size, tenant=meter.caller.tenant)
        check_size(plan, len(ask.pictures), top_k)
        async with meter.paid(points_of(plan, ask.pictures)) as store:
            pictures = await fetched(request, ask.pictures, plan.served, plan.defence)
            items = await service.answers.classify(plan, pictures, stages, meter)
            await meter.give_back(spared_of(ask.pictures, items, plan.defence), store)
            if ask.single and items[0].error is not None:
                raise items[0].error
            return plan, items

    plan, items = await deadline.within(work())
    request_id = request.state.request_id

    def write() -> Response:
        forms = [
            {"error": problem(item.error, request_id)} if item.error is not None else render(plan, item, top_k)
            for item in items
        ]
        content: Any = forms[0] if ask.single else forms
        return json_response(content, stages, headers={"Cache-Status": cache_status(items)})

    written = predictions_of(plan, top_k) + scores_of(plan) // _SCORES_PER_PREDICTION
    answer = await asyncio.to_thread(write) if written * len(items) > _THREAD_PREDICTIONS else write()
    remember(request, answer, ask.options.encoder, plan.served, ask.pictures, items, plan, ask.options.label_set)
    return answer


def points_of(plan: Plan, pictures: Sequence[Picture]) -> float:
    """What deciding about pictures costs, in points: their forwards. Texts are paid for where they are encoded."""
    return price_of(pictures, plan.defence)


def predictions_of(plan: Plan, top_k: int) -> int:
    """Predictions in the answer for one picture, those of the levels above the labels among them."""
    return min(top_k, len(plan.label_set)) + sum(min(top_k, len(nodes)) for nodes in plan.level_nodes.values())


def check_size(plan: Plan, images: int, top_k: int, most_comparisons: int = _MAX_COMPARISONS) -> None:
    """Refuse what would take too much memory to decide or to answer.

    Raises:
        InputTooLarge: too many scores, of labels or of what a defence holds of them, or too many comparisons.
        OptionError: too many predictions.
    """
    scores = images * scores_of(plan)
    if scores > _MAX_SCORES:
        raise InputTooLarge(
            f"{scores} scores of labels and levels over all images, at most {_MAX_SCORES} are made in one request.",
            limit=_MAX_SCORES,
        )
    labels, longest = plan.table
    # A defence that reads the labels weighs its views by them: it has a score of each label in each view.
    seen = images * plan.defence.view_count * labels if plan.defence.reads_labels else 0
    if seen > _MAX_SCORES:
        raise InputTooLarge(
            f"The defence would make {seen} scores of labels in views over all images, at most {_MAX_SCORES} are made "
            "in one request: send fewer images, or ask for fewer views or labels.",
            pointer="/defence",
            limit=_MAX_SCORES,
        )
    if plan.comparisons and plan.defence.view_count * labels * longest > _MAX_COSTS:
        raise InputTooLarge(
            f"{labels} labels with up to {longest} texts each, seen in {plan.defence.view_count} views, are more than "
            f"{_MAX_COSTS:.2g} costs: send fewer labels, or fewer texts of the label that has most.",
            pointer="/defence",
            limit=_MAX_COSTS,
        )
    if images * plan.comparisons > most_comparisons:
        raise InputTooLarge(
            f"The defence would make {images * plan.comparisons:.2g} comparisons of views and texts, at most "
            f"{most_comparisons:.2g} are made in one request: send fewer images, or ask for fewer views or texts, or "
            "for the product coupling.",
            pointer="/defence",
            limit=most_comparisons,
        )
    predictions = images * predictions_of(plan, top_k)
    if predictions > _MAX_PREDICTIONS:
        raise OptionError(
            f"The answer would hold {predictions} predictions over all images and levels, at most {_MAX_PREDICTIONS} "
            "fit; ask for a smaller top_k.",
            pointer="/top_k",
            limit=_MAX_PREDICTIONS,
        )


def render(plan: Plan, item: Item, top_k: int) -> dict[str, Any]:
    """The answer for one picture."""
    assert item.scores is not None
    scores = item.scores
    probabilities = softmax(scores["logits"])
    names = plan.label_set.names
    cosine = scores["cosine"]
    answer: dict[str, Any] = {
        "predictions": [
            {"label": names[k], "score": _short(probabilities[k]), "cosine": _short(cosine[k])}
            for k in best(probabilities, top_k)
        ]
    }
    if plan.tree is not None:
        answer["levels"] = {
            name: _level(nodes, softmax(scores[f"level:{name}"]), top_k) for name, nodes in plan.level_nodes.items()
        }
    answer["encoder"] = plan.encoder_form
    answer["label_set"] = plan.reference
    answer["preprocessing"] = {"digest": plan.served.encoder.preprocessing.digest, "warnings": item.warnings}
    answer["defence"] = plan.defence_form
    if plan.domain is not None:
        answer["domain"] = _domain(plan.domain, float(scores["domain"][0]))
    return answer


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax in float64: [K] -> [K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    result: NDArray[np.float64] = shifted / shifted.sum()
    return result


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the highest scores, best first; equal scores keep the labels' order."""
    if count < len(scores):
        top = np.sort(np.argpartition(-scores, count - 1)[:count])
        return top[np.argsort(-scores[top], kind="stable")]
    return np.argsort(-scores, kind="stable")


def cache_status(items: list[Item]) -> str:
    """The `Cache-Status` value (RFC 9211): a hit if no picture needed the image tower."""
    done = [item for item in items if item.error is None]
    hits = sum(item.from_cache for item in done)
    if done and hits == len(done):
        return "ironclip; hit"
    return f"ironclip; fwd=miss; detail={hits}-of-{len(done)}" if hits else "ironclip; fwd=miss"


def _domain(domain: Domain, score: float) -> dict[str, Any]:
    inside = score >= domain.threshold
    form = {
        "inside": inside,
        "score": _short(score),
        "threshold": domain.threshold,
        "description": domain.description,
    }
    if not inside:
        form["warning"] = (
            f"This picture is unlike what the encoder was trained on ({domain.description}); do not trust the "
            "predictions. Serve an encoder for such pictures, see IRONCLIP_ENCODERS."
        )
    return form


def _level(nodes: tuple[str, ...], probabilities: NDArray[np.float64], top_k: int) -> list[dict[str, Any]]:
    return [{"label": nodes[k], "score": _short(probabilities[k])} for k in best(probabilities, top_k)]


def _short(value: float) -> float:
    """Seven significant digits: what a float32 holds, without the tail that float64 would print."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    return float(f"{value:.7g}")
