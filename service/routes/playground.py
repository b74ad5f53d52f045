"""The playground at `/`: one page that shows what the other routes do, its files, and the sample pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import ironclip
from ironclip.errors import NotFound
from service.routes.common import etag_matches, json_response

router = APIRouter(tags=["playground"])

_PAGE = Path(__file__).parents[1] / "playground"
_SAMPLES = Path(ironclip.__file__).parent / "demo" / "samples"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".svg": "image/svg+xml",
}
# What is served is this list and nothing else that may come to lie in the folder.
_ASSETS = (
    "playground.css",
    "icon.svg",
    "theme.js",
    "playground.js",
    "api.js",
    "bars.js",
    "card.js",
    "controls.js",
    "curve.js",
    "dom.js",
    "figures.js",
    "key.js",
    "picture.js",
    "probing.js",
    "state.js",
    "stream.js",
    "words.js",
)
# Nothing from elsewhere and no code outside the files above: a label or a picture's name that holds markup stays text.
# Pictures arrive as data: URIs (adversarial ones) and are shown from blob: URLs (the visitor's own).
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
# Asked for anew each time, and answered 304: page, style and code of one version belong together.
_REVALIDATED = "no-cache"
_KEPT_A_DAY = "public, max-age=86400"


@dataclass(frozen=True)
class _File:
    """A file held in memory, with the headers it goes out with."""

    content: bytes
    headers: dict[str, str]

    def response(self, request: Request) -> Response:
        if etag_matches(request, self.headers["ETag"].strip('"')):
            kept = {name: value for name, value in self.headers.items() if name != "Content-Type"}
            return Response(status_code=304, headers=kept)
        return Response(self.content, headers=self.headers)


def _read(path: Path, cache: str, policy: str | None = None) -> _File:
    content = path.read_bytes()
    headers = {
        "Content-Type": _TYPES[path.suffix],
        "Cache-Control": cache,
        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
    }
    if policy is not None:
        headers |= {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return _File(content, headers)


def _credits() -> list[dict[str, str]]:
    """The rows of CREDITS.md, the one place where the samples and what their licences ask for are written down."""
    rows = []
    for line in (_SAMPLES / "CREDITS.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and Path(cells[0]).suffix in _TYPES:
            file, label, source, licence = cells
            credit = source.partition(" (`")[0]  # without the name of the package it came in
            row = {"name": Path(file).stem, "label": label, "url": f"/samples/{file}"}
            rows.append({**row, "credit": credit, "licence": licence})
    return rows


# Read once: small files, the same as long as the process lives.
_INDEX = _read(_PAGE / "index.html", _REVALIDATED, _POLICY)
_ASSET_FILES = {name: _read(_PAGE / name, _REVALIDATED) for name in _ASSETS}
_SAMPLE_ROWS = _credits()
_SAMPLE_FILES = {
    name: _read(_SAMPLES / name, _KEPT_A_DAY) for name in (row["url"].rpartition("/")[2] for row in _SAMPLE_ROWS)
}


@router.get("/", include_in_schema=False)
async def playground(request: Request) -> Response:
    """The page."""
    return _INDEX.response(request)


@router.get("/playground/{file}", include_in_schema=False)
async def playground_asset(request: Request, file: str) -> Response:
    """One file of the page."""
    if file not in _ASSET_FILES:
        raise NotFound("There is no such file.")
    return _ASSET_FILES[file].response(request)


@router.get("/samples", operation_id="listSamples", summary="List the sample pictures")
async def list_samples(request: Request) -> Response:
    """Openly licensed pictures to try the service with, each with the label that fits it, its credit and licence."""
    return json_response({"samples": _SAMPLE_ROWS})


@router.get("/samples/{file}", operation_id="getSample", summary="A sample picture")
async def get_sample(request: Request, file: str) -> Response:
    """One sample picture as a file."""
    if file not in _SAMPLE_FILES:
        raise NotFound("There is no such sample; GET /samples lists them.")
    return _SAMPLE_FILES[file].response(request)
