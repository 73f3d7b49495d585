"""The settings of a diffusers U-Net, and what must hold of them. Imports no torch."""

from typing import Annotated, Literal

from pipeline.config import ADDED_LATER, Fraction, Positive, Settings
from pipeline.errors import UserError
from pipeline.workflow.batch_shape import nearest_multiples

CLIP_EXTRA_CONTEXT_TOKENS = 4
"""Tokens that the image embedding adds to the caption's (unCLIP, section 2.1)."""


class UNetSettings(Settings):
    """A diffusers U-Net: `channels` per resolution level, each level half the size of the one before.

    Residual blocks take the timestep in by `resnet_time_scale_shift`, after the norm, or add it before ("default").
    """

    channels: tuple[Positive, ...]
    layers_per_block: Positive
    attention: tuple[bool, ...]
    attention_head_dim: Positive
    norm_groups: Positive
    dropout: Fraction
    resnet_time_scale_shift: Annotated[Literal["scale_shift", "default"], ADDED_LATER] = "scale_shift"


def check_unet(
    network: UNetSettings, image_size: int, path: str, size_path: str, context_length: int | None = None
) -> None:
    """Raise `UserError` if a U-Net of `network` cannot run on square pictures of `image_size` pixels.

    `path` is where the network's settings stand ("stage.decoder.network"), `size_path` where the size stands
    ("stage.decoder.image_size"). `context_length` is that of the caption's tokens; None means no cross-attention.
    """
    levels = len(network.channels)
    if len(network.attention) != levels:
        raise UserError(
            f"{path}.attention has {len(network.attention)} entries but channels has {levels}; "
            f"give one true or false per level"
        )
    halvings = 2 ** (levels - 1)
    if image_size % halvings:
        raise UserError(
            f"{size_path} {image_size} is not divisible by {halvings}, as the {levels} levels of "
            f"{path}.channels need; use {nearest_multiples(image_size, halvings)}, or fewer levels"
        )
    for level, (channels, attends) in enumerate(zip(network.channels, network.attention, strict=True)):
        if channels % network.norm_groups:
            raise UserError(
                f"{path}.channels[{level}] {channels} is not divisible by norm_groups {network.norm_groups}; "
                f"use {nearest_multiples(channels, network.norm_groups)}"
            )
        # With cross-attention the block in the middle attends in any case.
        if not attends and (context_length is None or level < levels - 1):
            continue
        if channels % network.attention_head_dim:
            raise UserError(
                f"{path}.channels[{level}] {channels} is not divisible by attention_head_dim "
                f"{network.attention_head_dim}; use {nearest_multiples(channels, network.attention_head_dim)}"
            )
        # diffusers pads the mask of the conditioning tokens to the spatial ones only where the two numbers differ.
        spatial_tokens = (image_size >> level) ** 2
        if context_length is not None and spatial_tokens == context_length + CLIP_EXTRA_CONTEXT_TOKENS:
            raise UserError(
                f"{path}.attention[{level}] works on {spatial_tokens} picture tokens, which must differ from the "
                f"{spatial_tokens} conditioning tokens (CLIP's context_length {context_length} + "
                f"{CLIP_EXTRA_CONTEXT_TOKENS}): diffusers cannot tell them apart; "
                f"change the context_length or the image size"
            )
