"""`export --to transformers`: an encoder as a folder that transformers' CLIPModel loads, with the same features.

Written without the transformers library, which only reads it: a config, weights under its names, the tokenizer's
vocabulary and merges, and the picture's preparation where transformers has it. So a robust tower drops into whatever
is built on CLIPModel or CLIPVisionModel (vision-language models among them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from ironclip.encoder import Encoder
from ironclip.errors import OptionError

_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def export_transformers(encoder: Encoder, folder: Path) -> list[str]:
    """Write ``encoder`` to ``folder``.

    Args:
        encoder: a CLIP with a vision transformer and CLIP's text tower, weights in float32.
        folder: made if missing.

    Returns:
        What transformers cannot be told, in words: nothing for a usual CLIP.

    Raises:
        OptionError: towers of another form, with the reason.
    """
    model: Any = encoder.model
    _check(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    quick = bool(encoder.model_cfg.get("quick_gelu"))
    text, vision = model.transformer, model.visual.transformer
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.dim,
        "logit_scale_init_value": float(model.logit_scale.detach()),
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": model.token_embedding.num_embeddings,
            "max_position_embeddings": encoder.context_length,
            "bos_token_id": encoder.tokenizer.sot_token_id,
            "eos_token_id": encoder.tokenizer.eot_token_id,
            "pad_token_id": encoder.tokenizer.eot_token_id,
            **_tower(text, quick, encoder.dim),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": encoder.resolution,
            "patch_size": model.visual.conv1.kernel_size[0],
            **_tower(vision, quick, encoder.dim),
        },
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: value.detach().float().contiguous() for name, value in _weights(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(encoder, folder)
    return [*_told_of_head(encoder), *_write_preparation(encoder, folder)]


def _told_of_head(encoder: Encoder) -> list[str]:
    """CLIPModel decides by cosine, whatever the encoder was made to decide by."""
    if encoder.head.type == "cosine":
        return []
    return [
        f"CLIPModel decides by the cosine of the features; this encoder decides by its {encoder.head.type} head, so "
        "that scores, and some decisions, will be others. Features are the same."
    ]


def _check(encoder: Encoder) -> None:
    model: Any = encoder.model
    if not isinstance(model, open_clip.CLIP) or not isinstance(model.visual, VisionTransformer):
        kind = type(getattr(model, "visual", model)).__name__
        raise OptionError(f"transformers' CLIPModel has a vision transformer; this encoder's image tower is a {kind}")
    visual = model.visual
    odd = {
        "an attentional pool": visual.attn_pool is not None,
        f"the pooling {visual.pool_type!r}": visual.pool_type != "tok",
        "no class token in front": visual.proj is None,
        "a text tower without a causal mask": model.attn_mask is None,
        "no text projection": model.text_projection is None,
        "a Hugging Face tokenizer": not isinstance(encoder.tokenizer, open_clip.SimpleTokenizer),
        "layer scale": any(not isinstance(block.ls_1, nn.Identity) for block in visual.transformer.resblocks),
    }
    found = [name for name, present in odd.items() if present]
    if found:
        raise OptionError(f"transformers' CLIPModel cannot hold this encoder: it has {', '.join(found)}")


def _tower(transformer: Any, quick: bool, dim: int) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "layer_norm_eps": block.ln_1.eps,
        "projection_dim": dim,
    }


def _weights(model: Any) -> dict[str, Tensor]:
    """Weights by transformers' names."""
    visual, projection = model.visual, model.text_projection
    named = {
        "logit_scale": model.logit_scale,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_projection.weight": projection.weight if isinstance(projection, nn.Linear) else projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "visual_projection.weight": visual.proj.T,
    }
    norms = {
        "text_model.final_layer_norm": model.ln_final,
        "vision_model.pre_layrnorm": visual.ln_pre,
        "vision_model.post_layernorm": visual.ln_post,
    }
    for prefix, transformer in (("text_model", model.transformer), ("vision_model", visual.transformer)):
        for number, block in enumerate(transformer.resblocks):
            start = f"{prefix}.encoder.layers.{number}"
            norms |= {f"{start}.layer_norm1": block.ln_1, f"{start}.layer_norm2": block.ln_2}
            linear = {"self_attn.out_proj": block.attn.out_proj, "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
            for name, layer in linear.items():
                named |= {f"{start}.{name}.weight": layer.weight, f"{start}.{name}.bias": layer.bias}
            rows = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
            for letter, weight, bias in rows:
                name = f"{start}.self_attn.{letter}_proj"
                named |= {f"{name}.weight": weight, f"{name}.bias": bias}
    for name, norm in norms.items():
        named |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    return named


def _write_tokenizer(encoder: Encoder, folder: Path) -> None:
    """CLIP's byte-pair encoding under transformers' names for start and end."""
    tokenizer: open_clip.SimpleTokenizer = encoder.tokenizer
    ends = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    vocabulary = {ends.get(number, word): number for word, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = ends[tokenizer.sot_token_id], ends[tokenizer.eot_token_id]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": encoder.context_length,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_preparation(encoder: Encoder, folder: Path) -> list[str]:
    """``preprocessor_config.json``, where transformers can prepare a picture as the encoder does."""
    mode, side = encoder.preprocess_cfg.get("resize_mode", "shortest"), encoder.resolution
    if mode == "longest":
        return [
            "transformers does not pad pictures to a square as this encoder does, so there is no "
            f"preprocessor_config.json: resize to {side} px on the longer side, pad, and use the mean and standard "
            "deviation of open_clip_config.json"
        ]
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else {"height": side, "width": side},
        "resample": _RESAMPLE[encoder.preprocess_cfg.get("interpolation", "bicubic")],
        "do_center_crop": mode == "shortest",
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": torch.flatten(encoder.mean).tolist(),
        "image_std": torch.flatten(encoder.std).tolist(),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return []
