"""A trained CLIP as transformers' classes, which diffusers' pipelines load too."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from stages.clip.network import ClipModel, bpe_vocabulary
from stages.clip.settings import ClipNetworkSettings

_TEXT_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# `pre_layrnorm` is transformers' spelling.
_VISION_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_MLP_RATIO = 4
_BICUBIC = 3  # Pillow's number


def save_transformers_clip(directory: Path, clip: ClipModel, dtype: torch.dtype) -> None:
    """Write a directory for `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`.

    `CLIPModel` has no place for SigLIP's `logit_bias`: its logits are ours without it.
    """
    text, vision = text_to_transformers(clip), vision_to_transformers(clip)
    whole = CLIPModel(
        CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config=vision.config.to_dict(),
            projection_dim=clip.settings.embed_dim,
        )
    )
    whole.load_state_dict(
        {**text.state_dict(), **vision.state_dict(), "logit_scale": clip.network.logit_scale.detach().reshape(())}
    )
    whole.eval().to(dtype).save_pretrained(directory)
    CLIPProcessor(image_processor_of(clip), tokenizer_of(clip)).save_pretrained(directory)


def tokenizer_of(clip: ClipModel) -> CLIPTokenizer:
    """The tokenizer; of captions that open_clip's has cleaned it makes the same tokens, padded otherwise."""
    vocabulary = bpe_vocabulary()
    return CLIPTokenizer(
        vocab=dict(vocabulary.ids),
        merges=cast(Any, list(vocabulary.merges)),
        model_max_length=clip.settings.context_length,
    )


def image_processor_of(clip: ClipModel) -> CLIPImageProcessor:
    """Pictures of any size -> the central square in the tower's size (bicubic), normalised as the tower takes it."""
    size = clip.settings.image_size
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=_BICUBIC,
        image_mean=clip.pixel_mean.flatten().tolist(),
        image_std=clip.pixel_std.flatten().tolist(),
    )


def text_to_transformers(model: ClipModel) -> CLIPTextModelWithProjection:
    """The text tower; `text_embeds` and `last_hidden_state` equal `ClipModel.encode_text` on the same token ids."""
    settings = model.settings
    assert isinstance(settings, ClipNetworkSettings), "there is no class for other towers"
    weights = model.network.state_dict()
    converted = {new: weights[old] for old, new in _TEXT_NAMES.items()}
    converted["text_projection.weight"] = weights["text_projection"].T.contiguous()
    converted |= _blocks(weights, "transformer.resblocks.", "text_model.encoder.layers.", settings.text_layers)
    tower = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=model.network.vocab_size,
            hidden_size=settings.text_width,
            intermediate_size=_MLP_RATIO * settings.text_width,
            projection_dim=settings.embed_dim,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=settings.text_heads,
            max_position_embeddings=settings.context_length,
            hidden_act=_activation(model),
            bos_token_id=model.network.vocab_size - 2,
            eos_token_id=model.network.vocab_size - 1,
            pad_token_id=model.network.vocab_size - 1,
        )
    )
    tower.load_state_dict(converted)
    return tower.eval()


def vision_to_transformers(model: ClipModel) -> CLIPVisionModelWithProjection:
    """The image tower; `image_embeds` equals `ClipModel.encode_image` on pictures of its size, normalised as CLIP's."""
    settings = model.settings
    assert isinstance(settings, ClipNetworkSettings), "there is no class for other towers"
    weights = model.network.state_dict()
    converted = {new: weights[old] for old, new in _VISION_NAMES.items()}
    converted["visual_projection.weight"] = weights["visual.proj"].T.contiguous()
    converted |= _blocks(
        weights, "visual.transformer.resblocks.", "vision_model.encoder.layers.", settings.vision_layers
    )
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=settings.vision_width,
            intermediate_size=int(settings.vision_width * settings.vision_mlp_ratio),
            projection_dim=settings.embed_dim,
            num_hidden_layers=settings.vision_layers,
            num_attention_heads=settings.vision_heads,
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            hidden_act=_activation(model),
        )
    )
    tower.load_state_dict(converted)
    return tower.eval()


def _activation(model: ClipModel) -> str:
    return "quick_gelu" if model.settings.quick_gelu else "gelu"


def _blocks(weights: dict[str, Tensor], old_prefix: str, new_prefix: str, layers: int) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for layer in range(layers):
        old, new = f"{old_prefix}{layer}.", f"{new_prefix}{layer}."
        for kind in ("weight", "bias"):
            for old_name, new_name in _BLOCK_NAMES.items():
                converted[f"{new}{new_name}.{kind}"] = weights[f"{old}{old_name}.{kind}"]
            projections = weights[f"{old}attn.in_proj_{kind}"].chunk(3)
            for name, projection in zip(("q_proj", "k_proj", "v_proj"), projections, strict=True):
                converted[f"{new}self_attn.{name}.{kind}"] = projection.contiguous()
    return converted
