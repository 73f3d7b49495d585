"""The weights of CLIPs that others made, under the names of open_clip's `CLIP`. No code in a file is ever run."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError
from stages.clip.sources import ClipSource, Layout

_LOGIT_SCALE = math.log(100.0)
"""That of OpenAI's CLIPs, for towers that were stored without theirs: only a training of CLIP itself reads it."""

# transformers' names, and open_clip's. `pre_layrnorm` is transformers' spelling.
_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_IN_BLOCKS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def read_clip_weights(source: ClipSource) -> dict[str, Tensor]:
    """All weights of a CLIP on disk, in its files' precision.

    Raises `UserError` if a file cannot be read without running code in it.
    """
    weights = {name: tensor for file in source.files for name, tensor in read_plain_weights(file).items()}
    match source.layout:
        case Layout.OPEN_CLIP:
            # DistributedDataParallel prefixes all keys, `torch.compile` too, `CustomTextCLIP` those of the text tower.
            return {_without_prefixes(name): tensor for name, tensor in weights.items()}
        case Layout.TRANSFORMERS:
            return _from_transformers(weights)


def read_plain_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, one that PyTorch wrote, or a training checkpoint with a `state_dict`."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a .safetensors, .pt or .bin file")
    try:
        content: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a file that is whole") from error
    except Exception as error:  # both raise whatever a broken or a foreign file leads to
        raise UserError(
            f"{file} is no file of plain weights ({type(error).__name__}); "
            "save the model's state_dict() as .safetensors or .pt"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{file} holds no state dict; save the model's state_dict() as .safetensors or .pt")
    return weights


def _without_prefixes(name: str) -> str:
    for prefix in ("module.", "_orig_mod.", "text."):
        name = name.removeprefix(prefix)
    return name


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(_LOGIT_SCALE)}
    projections: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith("position_ids"):
            continue
        block = _BLOCK.fullmatch(name)
        if block is None:
            is_transposed = name in _TRANSPOSED
            found[(_NAMES | _TRANSPOSED).get(name, name)] = tensor.T.contiguous() if is_transposed else tensor
            continue
        tower, number, part, kind = block.groups()
        ours = f"{_TOWERS[tower]}.resblocks.{number}."
        last = part.rpartition(".")[2]
        if last in _PROJECTIONS:
            projections.setdefault((ours, kind), {})[last] = tensor
        else:
            found[f"{ours}{_IN_BLOCKS.get(part, part)}.{kind}"] = tensor
    for (ours, kind), parts in projections.items():
        found[f"{ours}attn.in_proj_{kind}"] = torch.cat([parts[each] for each in _PROJECTIONS if each in parts])
    return found
