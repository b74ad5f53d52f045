"""What each method asks: from its arguments to one `Call`; pure, and the same for both clients."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ironclip_client import options as opt
from ironclip_client import probes, results, vectors
from ironclip_client.errors import UsageError
from ironclip_client.images import Encoded, ImageSource, read_image
from ironclip_client.parsing import each, pick
from ironclip_client.results import LabelSetSummary
from ironclip_client.sending import checked_seconds
from ironclip_client.wire import Call, Reply, image_call, images_call, plain, plain_call, segment, several

Options = Mapping[str, Any]
Version = str | LabelSetSummary | None

# A probe of up to so many seconds is asked for in one request: a service allows 30 for one if not set otherwise.
FITS_ONE_REQUEST = 20.0
_PROBE_SECONDS = 10.0
_IDEMPOTENCY_KEY = re.compile(r"[\x21\x23-\x7e]{1,255}")


class _Classify(opt.ClassifyOptions, total=False):
    labels: opt.Labels


class _Probe(opt.ProbeOptions, total=False):
    labels: opt.Labels


def classify(image: ImageSource, labels: opt.Labels | None, options: Options) -> Call[results.Classification]:
    """`POST /classify` for one picture, whose fault is the request's."""
    call, asked = _decision({**options, "labels": labels}, _Classify)
    _need_labels(asked)
    return image_call(
        "/classify", read_image(image), asked, call, lambda reply: results.classification(reply.json(), reply.meta)
    )


def classify_several(
    images: Iterable[ImageSource | Encoded], labels: opt.Labels | None, options: Options
) -> Call[results.Batch[results.Classification]]:
    """`POST /classify` for several pictures, each with an outcome of its own."""
    call, asked = _decision({**options, "labels": labels}, _Classify)
    _need_labels(asked)

    def read(reply: Reply) -> results.Batch[results.Classification]:
        return results.batch(reply.json(), lambda value: results.classification(value, reply.meta), reply.meta)

    sources = several(images, "images")
    if not sources:
        raise UsageError("images is empty.")
    return images_call("/classify", [read_image(one) for one in sources], asked, call, read)


def embed(images: Iterable[ImageSource], texts: Iterable[str], options: Options) -> Call[vectors.Embeddings]:
    """`POST /embed` for pictures and texts."""
    call, asked = _asked(options, opt.EmbedOptions)
    sources, lines = several(images, "images"), several(texts, "texts")
    if not sources and not lines:
        raise UsageError("Give images=[...], texts=[...], or both.")
    if not all(isinstance(line, str) for line in lines):
        raise UsageError("texts are strings.")
    asked = {"encoding_format": "base64", **asked, **({"texts": lines} if lines else {})}
    return images_call(
        "/embed",
        [read_image(one) for one in sources],
        asked,
        call,
        lambda reply: vectors.embeddings(reply.json(), reply.meta),
    )


def probe(
    image: ImageSource, labels: opt.Labels | None, options: Options, client_timeout: float
) -> Call[probes.ProbeResult]:
    """`POST /attack-probe`, answered when the probe has ended; whoever hangs up cancels it, so it may be sent again."""
    call, asked = _decision({**options, "labels": labels}, _Probe)
    call["timeout"] = probe_timeout(options, client_timeout)
    return image_call(
        "/attack-probe", read_image(image), asked, call, lambda reply: probes.probe_result(reply.json(), reply.meta)
    )


def probe_cost(image: ImageSource, labels: opt.Labels | None, options: Options) -> Call[Mapping[str, Any]]:
    """`POST /attack-probe` with `dry_run`."""
    call, asked = _decision({**options, "labels": labels}, _Probe)
    asked["dry_run"] = True
    return image_call("/attack-probe", read_image(image), asked, call, lambda reply: probes.probe_cost(reply.json()))


def probe_start(
    image: ImageSource, labels: opt.Labels | None, options: Options, idempotency_key: str | None = None
) -> Call[probes.ProbeStanding]:
    """`POST /attack-probe` with `Prefer: respond-async`; its key lets it be sent again, for the second begins nothing.

    Raises:
        UsageError: a key that no header can carry.
    """
    key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
    if not isinstance(key, str) or not _IDEMPOTENCY_KEY.fullmatch(key):
        raise UsageError("An idempotency_key has 1 to 255 printable ASCII characters, no blanks and no quotes.")
    call, asked = _decision({**options, "labels": labels}, _Probe)
    return image_call(
        "/attack-probe",
        read_image(image),
        asked,
        call,
        lambda reply: probes.probe_standing(reply.json()),
        headers={"Prefer": "respond-async", "Idempotency-Key": key},
    )


def probe_timeout(options: Options, client_timeout: float) -> float:
    """Seconds for a probe as a whole: what the caller says, else its own time and the client's on top.

    Raises:
        UsageError: not a number of seconds.
    """
    given = options.get("timeout")
    return checked_seconds(given) if given is not None else probe_seconds(options) + client_timeout


def probe_seconds(options: Options) -> float:
    """Wall clock that a probe asks for.

    Raises:
        UsageError: not a number.
    """
    seconds = options.get("seconds")
    try:
        return _PROBE_SECONDS if seconds is None else float(seconds)
    except (TypeError, ValueError):
        raise UsageError(f"seconds is a number, not {seconds!r}.") from None


def probe_get(id: str, options: Options) -> Call[probes.ProbeStanding]:
    """`GET /probes/{id}`."""
    return plain_call("GET", f"/probes/{segment(id)}", lambda reply: probes.probe_standing(reply.json()), options)


def probe_list(limit: int | None, cursor: str | None, options: Options) -> Call[probes.ProbeList]:
    """`GET /probes`."""
    asked = {"limit": limit, "cursor": cursor}
    params = [(name, str(value)) for name, value in asked.items() if value is not None]
    return plain_call("GET", "/probes", lambda reply: probes.probe_list(reply.json()), options, params=params)


def probe_cancel(id: str, options: Options) -> Call[None]:
    """`DELETE /probes/{id}`; as often as one likes, it stays cancelled."""
    return plain_call("DELETE", f"/probes/{segment(id)}", _nothing, options)


def probe_events(id: str, after: int | None) -> Call[None]:
    """`GET /probes/{id}/events` from behind an event on; the answer is a stream."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    headers |= {} if after is None else {"Last-Event-ID": str(after)}
    return Call("GET", f"/probes/{segment(id)}/events", _nothing, headers=headers)


def models(options: Options) -> Call[results.Models]:
    """`GET /models`."""

    def read(reply: Reply) -> results.Models:
        return pick(results.Models, reply.json(), models=each(results.model), defences=tuple)

    return plain_call("GET", "/models", read, options)


def model(name: str, options: Options) -> Call[results.Model]:
    """`GET /models/{name}`."""
    return plain_call("GET", f"/models/{segment(name)}", lambda reply: results.model(reply.json()), options)


def model_versions(name: str, options: Options) -> Call[results.ModelVersions]:
    """`GET /models/{name}`, its versions alone."""
    return plain_call("GET", f"/models/{segment(name)}", _standing, options)


def model_load(
    name: str, spec: str, digest: str | None, defence: Any, canary: float | None, options: Options
) -> Call[results.ModelVersions]:
    """`PUT /models/{name}`; not sent again where the first may have been heeded: the second would be a conflict."""
    content = {"spec": str(spec), "digest": digest, "defence": defence, "canary": canary}
    document = {key: plain(value) for key, value in content.items() if value is not None}
    path = f"/models/{segment(name)}"
    return plain_call("PUT", path, _standing, options, document=document, again="refused")


def model_promote(name: str, options: Options) -> Call[results.ModelVersions]:
    """`POST /models/{name}/promote`."""
    return plain_call("POST", f"/models/{segment(name)}/promote", _standing, options, again="refused")


def model_end_canary(name: str, options: Options) -> Call[results.ModelVersions]:
    """`DELETE /models/{name}/canary`."""
    return plain_call("DELETE", f"/models/{segment(name)}/canary", _standing, options, again="refused")


def model_unload(name: str, options: Options) -> Call[results.ModelVersions]:
    """`DELETE /models/{name}`."""
    return plain_call("DELETE", f"/models/{segment(name)}", _standing, options, again="refused")


def _standing(reply: Reply) -> results.ModelVersions:
    versions = each(lambda row: pick(results.ModelVersion, row, notes=tuple))
    return pick(results.ModelVersions, reply.json(), versions=versions)


def label_set_list(options: Options) -> Call[tuple[LabelSetSummary, ...]]:
    """`GET /label-sets`."""

    def read(reply: Reply) -> tuple[LabelSetSummary, ...]:
        answer = reply.json()
        rows = answer.get("label_sets") if isinstance(answer, Mapping) else None
        return each(lambda row: pick(LabelSetSummary, row))(rows)

    return plain_call("GET", "/label-sets", read, options)


def label_set_get(reference: str, if_none_match: Version, options: Options) -> Call[results.LabelSet | None]:
    """`GET /label-sets/{name}`; None where the caller has the newest version."""

    def read(reply: Reply) -> results.LabelSet | None:
        if reply.status == 304:
            return None
        return pick(results.LabelSet, reply.json(), labels=tuple, templates=_templates)

    headers = {} if if_none_match is None else {"If-None-Match": _etag(if_none_match)}
    return plain_call("GET", f"/label-sets/{segment(reference)}", read, options, headers=headers)


def label_set_put(
    name: str, document: Options, if_match: Version, only_new: bool, options: Options
) -> Call[LabelSetSummary]:
    """`PUT /label-sets/{name}`.

    Without a precondition it may be sent again, for the second leaves what the first left. With one it may not where
    the first may have been heeded: the second would be told of a conflict with the first.
    """
    if if_match is not None and only_new:
        raise UsageError("Give if_match or only_new: a set that is to be new has no version to match.")
    headers = {"If-None-Match": "*"} if only_new else {} if if_match is None else {"If-Match": _etag(if_match)}
    content = {key: plain(value) for key, value in document.items() if value is not None}
    content["labels"] = plain(several(document["labels"], "labels"))
    return plain_call(
        "PUT",
        f"/label-sets/{segment(name)}",
        lambda reply: pick(LabelSetSummary, reply.json()),
        options,
        headers=headers,
        document=content,
        again="refused" if headers else "safe",
    )


def label_set_delete(name: str, if_match: Version, options: Options) -> Call[None]:
    """`DELETE /label-sets/{name}`; not sent again where the first may have been heeded: the second would be a 404."""
    headers = {} if if_match is None else {"If-Match": _etag(if_match)}
    return plain_call("DELETE", f"/label-sets/{segment(name)}", _nothing, options, headers=headers, again="refused")


def ready(timeout: float) -> Call[results.Readiness]:
    """`GET /readyz`, once."""
    return Call("GET", "/readyz", lambda reply: results.Readiness(True), again="never", timeout=timeout)


def _asked(options: Options, kind: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    call, asked = opt.split(options, kind)
    return call, {name: plain(value) for name, value in asked.items()}


def _decision(options: Options, kind: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    labels = options.get("labels")
    call, asked = _asked(options if labels is None else {**options, "labels": several(labels, "labels")}, kind)
    if "labels" in asked and "label_set" in asked:
        raise UsageError("Give labels or label_set, not both.")
    return call, asked


def _need_labels(asked: Options) -> None:
    if "labels" not in asked and "label_set" not in asked:
        raise UsageError("Say what to choose from: labels=[...], or label_set='name' of a registered set.")


def _etag(version: str | LabelSetSummary) -> str:
    digest = version if isinstance(version, str) else version.digest
    return f'"{digest.strip().removeprefix("W/").strip(chr(34))}"'


def _templates(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _nothing(reply: Reply) -> None:
    return None
