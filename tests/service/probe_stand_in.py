"""A service with a scripted `/attack-probe` in front of a real one that has none yet.

TODO: once the service itself has `/attack-probe`, take the script out and leave the proxy, which stands for a gateway.
The events have the form that is agreed for the real route; their numbers mean nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

Json = dict[str, Any]

STATEMENT = "Empirical: the smallest change that these attacks found within their budget, not a certificate."
_HOP = {"content-length", "transfer-encoding", "connection", "content-encoding"}


class StandIn:
    """Scripted probes, and a proxy to `upstream` for everything else.

    Args:
        upstream: URL of a real service.
        step: seconds between two events.
    """

    def __init__(self, upstream: str, step: float = 0.02) -> None:
        self.upstream = upstream
        self.step = step
        self.probes: dict[str, Json] = {}
        self.cancelled: list[str] = []
        self.client = httpx.AsyncClient(base_url=upstream, timeout=30)
        routes = [
            Route("/attack-probe", self.start, methods=["POST"]),
            Route("/probes/{id}", self.state, methods=["GET"]),
            Route("/probes/{id}", self.cancel, methods=["DELETE"]),
            Route("/probes/{id}/events", self.events, methods=["GET"]),
            Route("/{path:path}", self.forward, methods=["GET", "POST", "PUT", "DELETE"]),
        ]
        # All of it below a prefix too, as a gateway would have it, where nothing is left at the root.
        self.app = Starlette(routes=[Mount("/below/a/prefix", routes=routes), *routes])

    async def forward(self, request: Request) -> Response:
        """Ask the real service."""
        headers = {name: value for name, value in request.headers.items() if name not in {"host", *_HOP}}
        answer = await self.client.request(
            request.method,
            "/" + request.path_params["path"],
            params=request.url.query,
            headers=headers,
            content=await request.body(),
        )
        kept = {name: value for name, value in answer.headers.items() if name not in _HOP}
        return Response(answer.content, answer.status_code, kept)

    async def start(self, request: Request) -> Response:
        """Begin a probe, after the clean picture was classified for real."""
        asked = await request.json()
        options = {
            name: asked[name] for name in ("image", "labels", "label_set", "encoder", "defence") if name in asked
        }
        answer = await self.client.post("/classify", json=options)
        if answer.status_code != 200:
            return Response(answer.content, answer.status_code, media_type="application/problem+json")
        predictions = answer.json()["predictions"]
        label = asked.get("label") or predictions[0]["label"]
        if label not in [one["label"] for one in predictions]:
            detail = f"The true label {label!r} is not one of the labels."
            form = {"type": "/problems/option-invalid", "title": "An option is wrong", "status": 422}
            return JSONResponse({**form, "detail": detail, "code": "option-invalid"}, 422)
        name = f"probe-{len(self.probes)}"
        self.probes[name] = {"asked": asked, "predictions": predictions, "label": label, "encoder": answer.json()}
        form = {"id": name, "status": "queued", "events": f"/probes/{name}/events"}
        return JSONResponse(form, 202, {"Location": f"/probes/{name}"})

    async def state(self, request: Request) -> Response:
        """What is known of a probe."""
        name = request.path_params["id"]
        return JSONResponse({"id": name, "status": "running", "result": None, "error": None, "points": []})

    async def cancel(self, request: Request) -> Response:
        """Note that a probe was cancelled."""
        self.cancelled.append(request.path_params["id"])
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        """The script of one probe, an event every `step` seconds."""
        script = list(_script(self.probes[request.path_params["id"]]))

        async def stream() -> AsyncIterator[str]:
            for kind, data in script:
                await asyncio.sleep(self.step)
                yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


def _script(probe: Json) -> Iterator[tuple[str, Json]]:
    """Bisection over eps, each budget's score falling in three steps; the robust encoder's holds longer."""
    asked, label, predictions = probe["asked"], probe["label"], probe["predictions"]
    most = float(asked.get("max_eps", 16))
    weak = "robust" not in asked["encoder"]
    limit = 0.75 if weak else 3.25
    score = next(one["score"] for one in predictions if one["label"] == label)
    other = next((one["label"] for one in predictions if one["label"] != label), "something else")
    first = predictions[0]
    clean = {**first, "margin": 3.1, "correct": first["label"] == label, "predictions": predictions[:5]}
    yield "started", {"clean": clean, "label": label, "unit": "1/255", "max_eps": most}
    points: dict[float, Json] = {}
    low, high, gradients = 0.0, None, 0
    eps = most
    while clean["correct"] and (high is None or high - low > (0.25 if weak else 0.5)) and low < most:
        final = score / (1 + (eps / limit) ** (2.6 if weak else 3.4))
        for share in (0.6, 0.85, 1.0):
            gradients += 7
            value = score - share * (score - final)
            broken = share == 1.0 and eps >= limit
            said, its = (other, 0.93 * (1 - value)) if broken else (label, value)
            points[eps] = {
                "eps": eps, "broken": broken, "label": said, "score": its, "score_of_label": value,
                "steps": gradients // 7, "gradients": gradients,
            }  # fmt: skip
            yield "point", points[eps]
        low, high = (low, eps) if points[eps]["broken"] else (eps, high)
        yield "progress", {"gradients": gradients, "elapsed": gradients / 90, "robust_to": low, "broken_at": high}
        if high == eps:
            yield "artefacts", {"eps": eps, **_pictures(asked["image"], eps)}
        eps = (low + high) / 2 if high is not None else most
    answer: Json = {
        "status": "complete", "statement": STATEMENT, "clean": clean, "label": label, "target": None,
        "norm": "linf", "unit": "1/255", "points": [points[eps] for eps in sorted(points)],
        "robust_to": low, "broken_at": high if clean["correct"] else 0,
        "attack": {"name": "apgd-ce", "adaptive": True}, "effort": asked.get("effort", "quick"),
        "encoder": probe["encoder"]["encoder"], "label_set": probe["encoder"]["label_set"],
        "defence": {"name": "none"}, "preprocessing": probe["encoder"]["preprocessing"],
        "cost": {"gradients": gradients, "forwards": gradients + 9, "seconds": gradients / 90},
        "warnings": [], "artefacts": _pictures(asked["image"], high) if high else {},
    }  # fmt: skip
    yield "done", answer


def _pictures(image: str, eps: float) -> Json:
    rgba = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    clean = np.asarray(Image.alpha_composite(white, rgba).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(7).choice([-1.0, 1.0], (16, 16, 3)).repeat(4, 0).repeat(4, 1)
    noise *= np.random.default_rng(8).choice([-1.0, 1.0], (64, 64, 3), p=[0.2, 0.8])
    adversarial = np.clip(clean + eps * noise, 0, 255)
    return {
        "adversarial": _data_uri(adversarial),
        "perturbation": _data_uri(128 + (adversarial - clean) / max(eps, 1e-6) * 90),
    }


def _data_uri(values: np.ndarray[Any, Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextlib.contextmanager
def serve(stand_in: StandIn, port: int) -> Iterator[str]:
    """Serve on a thread; yields the URL."""
    config = uvicorn.Config(stand_in.app, port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(5)
