"""One answer of each main operation, as the OpenAPI document shows it; a test holds them to the document's schemas."""

from __future__ import annotations

from typing import Any

_DIGEST = "6cab372567860ba1a4c24795c29395eff7c2db1724e34ba15281147eb36d302c"
_ENCODER = {"name": "demo-robust", "digest": _DIGEST, "dtype": "float32", "head": "cosine"}
_PIXELS = "a61f1fa9aca5712bcffbbca5f6bfe816dc325c73266118358bfa075268eca9f1"
_PETS = {
    "name": "pets",
    "digest": "b26ad6365621717193cef552cbfc78f49dede01d0d83333b890bc0fcc6ec92c0",
    "read_only": False,
}
_EMOJI = {
    "name": "emoji",
    "digest": "ea9b5171fc259a992b2cb5920670dfea5865c0d663927a771e7d926a36b99f93",
    "read_only": True,
}
_MODEL = {
    **_ENCODER,
    "spec": "demo-robust",
    "capabilities": ["classify", "embed-image", "embed-text"],
    "dim": 256,
    "resolution": 64,
    "context_length": 32,
    "logit_scale": 41.9826,
    "default_templates": ["an emoji of {}"],
    "defence": {"name": "none"},
    "device": "cpu",
    "preprocessing": {"digest": _PIXELS, "resolution": 64, "interpolation": "bicubic", "resize_mode": "longest"},
}
_STANDING = {
    "name": "robust",
    "versions": [
        {
            "role": "coming",
            "state": "loading",
            "share": 0.0,
            "since": "2026-03-01T12:00:00Z",
            "digest": None,
            "spec": "/models/robust-v2",
            "source": "api",
            "defence": {"name": "none"},
            "requests_in_hand": 0,
            "notes": [],
            "failure": None,
        }
    ],
}
_PROBE = "569065e2bd2b4ac4b966714371a044d8"
_POINTS = [
    {
        "eps": 4.0,
        "broken": False,
        "state": "held",
        "steps": 43,
        "gradients": 42,
        "score_of_label": 0.91,
        "label": "rocket",
        "score": 0.09,
    },
    {
        "eps": 8.0,
        "broken": True,
        "state": "broken",
        "steps": 12,
        "gradients": 12,
        "score_of_label": 0.44,
        "label": "rocket",
        "score": 0.56,
        "attack": "apgd-ce",
    },
]
_CLEAN = {"label": "carrot", "score": 0.99, "margin": 4.6, "correct": True}
_PROBED = {
    "status": "complete",
    "statement": "Empirical: an attack that failed is no proof that none succeeds. It is not a certificate.",
    "objective": "label",
    "clean": _CLEAN,
    "label": "carrot",
    "target": None,
    "norm": "linf",
    "unit": "1/255",
    "resolution": 64,
    "points": _POINTS,
    "robust_to": 4.0,
    "broken_at": 8.0,
    "effort": "standard",
    "attack": {"name": "apgd-ce", "adaptive": True, "draws": "fixed", "seed": 0},
    "cost": {"gradients": 54, "forwards": 58, "confirmations": 2, "views": 1, "tower_passes": 168, "seconds": 1.2},
    "warnings": [],
    "encoder": _ENCODER,
    "label_set": {"digest": "c4e77de7503754d5c307f48e66db4b8ffb466814e0bdb2d03d280d3f190cc410"},
    "level": None,
    "defence": {"name": "none"},
    "preprocessing": {"digest": _PIXELS, "warnings": []},
}

# By the operation's id: what a 200 (or 201) has as JSON.
ANSWERS: dict[str, Any] = {
    "classify": {
        "predictions": [
            {"label": "carrot", "score": 0.9871, "cosine": 0.6022},
            {"label": "rocket", "score": 0.0129, "cosine": 0.4989},
        ],
        "encoder": _ENCODER,
        "label_set": {"digest": "dc40a77701b33dcdc37062ad5e0b64611b2c0c42d6a6ecb11b9fb6069e53adbf"},
        "preprocessing": {"digest": _PIXELS, "warnings": ["alpha-composited"]},
        "defence": {"name": "none"},
    },
    "embed": {
        "encoder": _ENCODER,
        "dim": 3,
        "embed_dtype": "float32",
        "preprocessing": {"digest": _PIXELS},
        "defence": {"name": "none"},
        "images": [{"embedding": [0.6, 0.0, -0.8], "warnings": []}],
        "texts": [{"embedding": [0.8, 0.6, 0.0]}],
    },
    "attackProbe": _PROBED,
    "listProbes": {
        "probes": [
            {
                "id": _PROBE,
                "status": "done",
                "created": "2026-03-01T12:00:00.000+00:00",
                "started": "2026-03-01T12:00:00.042+00:00",
                "encoder": _ENCODER,
                "defence": {"name": "none"},
                "label": "carrot",
                "unit": "1/255",
                "robust_to": 4.0,
                "broken_at": 8.0,
                "error": None,
            }
        ],
        "next": f"/probes?limit=1&cursor=1772366400000-{_PROBE}",
        "partial": False,
    },
    "getProbe": {"id": _PROBE, "status": "done", "points": _POINTS, "result": _PROBED, "error": None},
    "listLabelSets": {"label_sets": [_EMOJI, _PETS], "next": "/label-sets?limit=2&cursor=pets"},
    "getLabelSet": {**_PETS, "labels": ["cat", "dog"], "templates": ["a photo of a {}"]},
    "putLabelSet": _PETS,
    "listModels": {"default": "demo-robust", "models": [_MODEL]},
    "getModel": _MODEL,
    "openaiEmbeddings": {
        "object": "list",
        "model": "demo-robust",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.8, 0.6, 0.0]}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    },
}
# The same of a 202.
ACCEPTED: dict[str, Any] = {
    "attackProbe": {"id": _PROBE, "status": "queued", "events": f"/probes/{_PROBE}/events"},
    "putModel": _STANDING,
}
