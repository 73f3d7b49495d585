"""A trained CLIP as a directory that `open_clip.create_model("local-dir:...")` loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stages.clip.network import ClipModel
from stages.clip.settings import tower_configs

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
"""The first name that open_clip looks for, in a directory as on the hub."""
_SCALARS = ("logit_scale", "logit_bias")


def save_open_clip(directory: Path, clip: ClipModel, dtype: torch.dtype) -> None:
    """Write the config and the weights; the tokenizer is open_clip's own, at the context length of the config."""
    weights = {name: each.detach().to(dtype).contiguous() for name, each in clip.network.state_dict().items()}
    # As open_clip has them by default; ours have a dimension for DeepSpeed.
    weights |= {name: weights[name].reshape(()) for name in _SCALARS if name in weights}
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps({"model_cfg": _model_config(clip), "preprocess_cfg": _preprocessing(clip)}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _model_config(clip: ClipModel) -> dict[str, Any]:
    settings = clip.settings
    vision, text = tower_configs(settings)
    config: dict[str, Any] = {
        "embed_dim": settings.embed_dim,
        "quick_gelu": settings.quick_gelu,
        "vision_cfg": vision,
        "text_cfg": {"vocab_size": clip.network.vocab_size, **text},
    }
    if clip.logit_bias is not None:
        config["init_logit_bias"] = float(clip.logit_bias.detach())
    return config


def _preprocessing(clip: ClipModel) -> dict[str, Any]:
    return {
        "mean": clip.pixel_mean.flatten().tolist(),
        "std": clip.pixel_std.flatten().tolist(),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
