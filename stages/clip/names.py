"""How open_clip and transformers call the weights of a CLIP with a plain ViT, and their shapes. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from pipeline.workflow.weights import Shape

LOGIT_BIAS = "logit_bias"
MAY_EXCEED = ("attn_mask", LOGIT_BIAS)
"""What a file of open_clip's may hold besides."""

TEXT, VISION = "text_model.", "vision_model."
"""What transformers' names of a tower begin with."""

PROJECTIONS = {TEXT: ("text_projection", "text_projection.weight"), VISION: ("visual.proj", "visual_projection.weight")}
"""Of both towers open_clip's name and transformers', where the matrix is transposed."""

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""transformers' three matrices of an attention, `self_attn.`, which are one with open_clip: `attn.in_proj_`."""

# `pre_layrnorm` is transformers' spelling.
_OUTSIDE_BLOCKS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def blocks(tower: str, network: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the names of each block of a tower begin with, open_clip's and transformers'."""
    ours, layers = ("transformer", "text_layers") if tower == TEXT else ("visual.transformer", "vision_layers")
    return [(f"{ours}.resblocks.{each}.", f"{tower}encoder.layers.{each}.") for each in range(network[layers])]


def same_weights(tower: str, network: Mapping[str, Any]) -> dict[str, str]:
    """open_clip's names of the weights that transformers has as they are, and its names of them."""
    outside = {ours: theirs for ours, theirs in _OUTSIDE_BLOCKS.items() if theirs.startswith(tower)}
    return outside | {
        f"{ours}{one}.{kind}": f"{theirs}{other}.{kind}"
        for ours, theirs in blocks(tower, network)
        for one, other in _IN_BLOCKS.items()
        for kind in ("weight", "bias")
    }


def vit_shapes(network: Mapping[str, Any], vocabulary: int) -> dict[str, Shape]:
    """The shapes of all weights of such a network, by open_clip's names; `network` as in `ClipNetworkSettings`."""
    embed, text, vision, patch = (network[key] for key in ("embed_dim", "text_width", "vision_width", "patch_size"))
    shapes: dict[str, Shape] = {
        "logit_scale": (1,),
        "token_embedding.weight": (vocabulary, text),
        "positional_embedding": (network["context_length"], text),
        "text_projection": (text, embed),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((network["image_size"] // patch) ** 2 + 1, vision),
        "visual.conv1.weight": (vision, 3, patch, patch),
        "visual.proj": (vision, embed),
    }
    norms = {"ln_final": text, "visual.ln_pre": vision, "visual.ln_post": vision}
    for tower, width, ratio in ((TEXT, text, 4.0), (VISION, vision, network["vision_mlp_ratio"])):
        inner = int(width * ratio)
        matrices = {
            "attn.in_proj_": (3 * width, width),
            "attn.out_proj.": (width, width),
            "mlp.c_fc.": (inner, width),
            "mlp.c_proj.": (width, inner),
        }
        for block, _ in blocks(tower, network):
            norms |= {f"{block}ln_1": width, f"{block}ln_2": width}
            for name, (outputs, inputs) in matrices.items():
                shapes |= {f"{block}{name}weight": (outputs, inputs), f"{block}{name}bias": (outputs,)}
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
