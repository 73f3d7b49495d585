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

from stages.clip.names import PROJECTIONS, QUERY_KEY_VALUE, TEXT, VISION, blocks, same_weights
from stages.clip.network import ClipModel, bpe_vocabulary
from stages.clip.settings import ClipNetworkSettings

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
    tower.load_state_dict(_converted(model, TEXT))
    return tower.eval()


def vision_to_transformers(model: ClipModel) -> CLIPVisionModelWithProjection:
    """The image tower; `image_embeds` equals `ClipModel.encode_image` on pictures of its size, normalised as CLIP's."""
    settings = model.settings
    assert isinstance(settings, ClipNetworkSettings), "there is no class for other towers"
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
    tower.load_state_dict(_converted(model, VISION))
    return tower.eval()


def _activation(model: ClipModel) -> str:
    return "quick_gelu" if model.settings.quick_gelu else "gelu"


def _converted(model: ClipModel, tower: str) -> dict[str, Tensor]:
    """A tower's weights by transformers' names."""
    weights, network = model.network.state_dict(), model.settings.model_dump()
    ours, theirs = PROJECTIONS[tower]
    converted = {theirs: weights[ours].T.contiguous()}
    converted |= {theirs: weights[ours] for ours, theirs in same_weights(tower, network).items()}
    for ours, theirs in blocks(tower, network):
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(QUERY_KEY_VALUE, parts, strict=True):
                converted[f"{theirs}self_attn.{name}.{kind}"] = part.contiguous()
    return converted
