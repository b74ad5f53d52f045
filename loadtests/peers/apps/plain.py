"""The control: one FastAPI route over the same tower, a thread a request, no batching."""

from __future__ import annotations

import base64

from fastapi import FastAPI
from pydantic import BaseModel

from loadtests.peers.apps.tower import Tower

app = FastAPI()
tower = Tower()


class Ask(BaseModel):
    """One picture, base64."""

    image: str


@app.get("/health")
def health() -> dict[str, str]:
    """Answered as soon as the model is loaded."""
    return {"status": "ok"}


@app.post("/embed")
def embed(ask: Ask) -> dict[str, str]:
    """The picture's vector."""
    return {"vector": tower.encode([tower.decode(base64.b64decode(ask.image))])[0]}
