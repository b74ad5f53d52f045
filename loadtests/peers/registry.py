"""The peers: how each is started, asked and read. What they serve is in `loadtests/peers/apps`."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.client import post
from loadtests.processes import ROOT, ironclip

FOLDER = Path(__file__).parent
VENVS = FOLDER / ".venvs"
MODELS = FOLDER / ".models"
COMPLETE = ".complete"  # in an environment that is
BOTH = ("float32", "bfloat16")
# So small that a cycle through the fresh pictures never meets one that is still there; those that come again and again
# are.
_CACHE_BYTES = 300_000

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Start:
    """What a peer is started with.

    Attributes:
        python: the interpreter of its environment.
        port: on 127.0.0.1.
        model: an open_clip architecture; weights are random, of seed 0.
        dtype: 'float32' or 'bfloat16'.
        threads: of torch.
        folder: for what it writes.
        settings: of ours, beside those; see `ironclip`.
    """

    python: Path
    port: int
    model: str
    dtype: str
    threads: int
    folder: Path
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        name: as tables show it.
        distribution: whose version is recorded; empty for ours.
        command: what starts it.
        request: a picture as a complete HTTP request.
        vector: an answer's body as a float32 vector.
        ready: path that answers 200 when it can be used.
        extra: of pyproject.toml, with what its own environment needs.
        dtypes: that it can be given.
        note: what a reader of the table has to know.
        rival: whether it is a server that others make; ours and the control are none, and run in this environment until
            theirs are set up.
    """

    name: str
    distribution: str
    command: Callable[[Start], list[str]]
    request: Callable[[bytes], bytes]
    vector: Callable[[bytes], Vector]
    ready: str
    extra: str
    dtypes: tuple[str, ...] = BOTH
    note: str = ""
    rival: bool = True

    @property
    def home(self) -> Path | None:
        """The environment of its own; None for one that runs in this one."""
        own = VENVS / self.name
        return own if self.rival or (own / COMPLETE).exists() else None

    @property
    def python(self) -> Path:
        """The interpreter that it runs under."""
        return self.home / "bin" / "python" if self.home else Path(sys.executable)

    def environment(self, start: Start) -> dict[str, str]:
        """The environment that it is started in: the same threads for all, nothing fetched, nothing reported home."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("IRONCLIP_")}
        if self.name == "ironclip":
            own = {"cache_bytes": _CACHE_BYTES, "dtype": start.dtype, "threads": start.threads, **start.settings}
            plain = ironclip(f"bench=random:{start.model}", start.port, start.folder / "state", **own)[1]
        return plain | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(start.threads),
            "MKL_NUM_THREADS": str(start.threads),
            "PEER_MODEL": start.model,
            "PEER_DTYPE": start.dtype,
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(start.folder / "bentoml"),
        }


def _decoded(text: str) -> Vector:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _as_json(path: str, content: object) -> bytes:
    return post(path, json.dumps(content).encode(), "application/json")


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _infinity(start: Start) -> list[str]:
    program = str(start.python.with_name("infinity_emb"))
    model = ["--model-id", str(MODELS / start.model), "--served-model-name", "clip", "--engine", "torch"]
    shape = ["--device", "cpu", "--dtype", start.dtype, "--no-bettertransformer", "--batch-size", "32"]
    return [program, "v2", *model, *shape, "--host", "127.0.0.1", "--port", str(start.port)]


def _bentoml(start: Start) -> list[str]:
    target = ["loadtests.peers.apps.bentoml:Embedder", "--working-dir", str(ROOT)]
    return [str(start.python), "-m", "bentoml", "serve", *target, "--host", "127.0.0.1", "--port", str(start.port)]


def _infinity_request(picture: bytes) -> bytes:
    uri = f"data:image/jpeg;base64,{_text(picture)}"
    ask = {"model": "clip", "modality": "image", "encoding_format": "base64", "input": [uri]}
    return _as_json("/embeddings", ask)


PEERS: dict[str, Peer] = {
    "ironclip": Peer(
        name="ironclip",
        distribution="",
        command=lambda start: [str(start.python), "-m", "service"],
        request=lambda picture: post("/embed?encoding_format=base64", picture, "image/jpeg"),
        vector=lambda body: _decoded(json.loads(body)["images"][0]["embedding"]),
        ready="/readyz",
        extra="serve",
        note="the picture as the body",
        rival=False,
    ),
    "infinity": Peer(
        name="infinity",
        distribution="infinity-emb",
        command=_infinity,
        request=_infinity_request,
        vector=lambda body: _decoded(json.loads(body)["data"][0]["embedding"]),
        ready="/health",
        dtypes=("float32",),
        extra="peer-infinity",
        note="transformers' CLIPModel with the same weights; casts to bfloat16 on GPUs alone",
    ),
    "litserve": Peer(
        name="litserve",
        distribution="litserve",
        command=lambda start: [str(start.python), "-m", "loadtests.peers.apps.litserve", str(start.port)],
        request=lambda picture: _as_json("/predict", {"image": _text(picture)}),
        vector=lambda body: _decoded(json.loads(body)["vector"]),
        ready="/health",
        extra="peer-litserve",
        note="JSON with base64",
    ),
    "mosec": Peer(
        name="mosec",
        distribution="mosec",
        command=lambda start: [
            *(str(start.python), "-m", "loadtests.peers.apps.mosec", "--address", "127.0.0.1"),
            *("--port", str(start.port), "--timeout", "60000"),
        ],
        request=lambda picture: post("/inference", picture, "image/jpeg"),
        vector=lambda body: _decoded(body.decode()),
        ready="/",
        extra="peer-mosec",
        note="the picture as the body; decodes in as many processes as there are threads",
    ),
    "bentoml": Peer(
        name="bentoml",
        distribution="bentoml",
        command=_bentoml,
        request=lambda picture: _as_json("/embed", {"images": [_text(picture)]}),
        vector=lambda body: _decoded(json.loads(body)[0]),
        ready="/readyz",
        extra="peer-bentoml",
        note="JSON with base64",
    ),
    "fastapi": Peer(
        name="fastapi",
        distribution="fastapi",
        command=lambda start: [
            *(str(start.python), "-m", "uvicorn", "loadtests.peers.apps.plain:app", "--host", "127.0.0.1"),
            *("--port", str(start.port), "--log-level", "warning"),
        ],
        request=lambda picture: _as_json("/embed", {"image": _text(picture)}),
        vector=lambda body: _decoded(json.loads(body)["vector"]),
        ready="/health",
        extra="peer-fastapi",
        note="the control: a thread a request, no batching",
        rival=False,
    ),
}
