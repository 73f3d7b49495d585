"""The weights of CLIPs that others made, under the names of open_clip's `CLIP`. No code in a file is ever run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.clip.names import PROJECTIONS, QUERY_KEY_VALUE, blocks, same_weights
from stages.clip.sources import ClipSource, Layout, open_clip_name
from stages.weights import read_plain_weights

_LOGIT_SCALE = math.log(100.0)
"""That of OpenAI's CLIPs, for towers that were stored without theirs: only a training of CLIP itself reads it."""


def read_clip_weights(source: ClipSource) -> dict[str, Tensor]:
    """All weights of a CLIP on disk, in its files' precision.

    Raises `UserError` if a file cannot be read without running code in it.
    """
    weights = {name: tensor for file in source.files for name, tensor in read_plain_weights(file).items()}
    match source.layout:
        case Layout.OPEN_CLIP:
            return {open_clip_name(name): tensor for name, tensor in weights.items()}
        case Layout.TRANSFORMERS:
            assert source.network is not None, "as its config says"
            return _from_transformers(weights, source.network)


def _from_transformers(weights: dict[str, Tensor], network: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"logit_scale": weights.pop("logit_scale", torch.tensor(_LOGIT_SCALE))}
    for tower, (ours, theirs) in PROJECTIONS.items():
        if theirs in weights:
            found[ours] = weights.pop(theirs).T.contiguous()
        same = same_weights(tower, network)
        found |= {ours: weights.pop(theirs) for ours, theirs in same.items() if theirs in weights}
        for ours, theirs in blocks(tower, network):
            for kind in ("weight", "bias"):
                names = [f"{theirs}self_attn.{each}.{kind}" for each in QUERY_KEY_VALUE]
                if all(name in weights for name in names):
                    found[f"{ours}attn.in_proj_{kind}"] = torch.cat([weights.pop(name) for name in names])
    # What is left fits nowhere, and is said to be in excess.
    return found | {name: each for name, each in weights.items() if not name.endswith("position_ids")}
