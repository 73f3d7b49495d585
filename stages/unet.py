"""Rules between settings that must hold before a network is built. Imports no torch, so planning can apply them."""

import math
from collections.abc import Mapping

from pipeline.data.shards import expand_shards
from pipeline.data.splits import check_batches_are_distinct
from pipeline.errors import UserError
from pipeline.workflow.batch_shape import nearest_multiples
from pipeline.workflow.declaration import StageSettings
from stages.prepare.source import split_counts
from stages.settings import (
    ClipNetworkSettings,
    ClipSettings,
    DataSettings,
    DecoderCondition,
    DecoderSettings,
    ObjectiveSettings,
    PredictionType,
    PrepareSettings,
    PriorSettings,
    ScheduleKind,
    ScheduleSettings,
    UNetSettings,
    UpsamplerSettings,
    WebDatasetSettings,
)

CLIP_EXTRA_CONTEXT_TOKENS = 4
"""Tokens that the image embedding adds to the caption's (unCLIP, section 2.1)."""

LINEAR_BETA_END_TIMES_TIMESTEPS = 20
"""The linear schedule ends at beta = 20 / timesteps (DDPM: 0.02 at 1000), which must stay below 1."""


def check_clip_network(network: ClipNetworkSettings, path: str) -> None:
    """Raise `UserError` if the towers cannot be built; `path` is where they stand, such as "stage.clip.network"."""
    if network.image_size % network.patch_size:
        raise UserError(
            f"{path}.image_size {network.image_size} is not divisible by patch_size {network.patch_size}; "
            f"use {nearest_multiples(network.image_size, network.patch_size)}"
        )
    for tower, width, heads in (
        ("vision", network.vision_width, network.vision_heads),
        ("text", network.text_width, network.text_heads),
    ):
        if width % heads:
            raise UserError(
                f"{path}.{tower}_width {width} is not divisible by {tower}_heads {heads}; "
                f"use a width of {nearest_multiples(width, heads)}"
            )
    if network.text_width != network.embed_dim:
        raise UserError(
            f"{path}.text_width {network.text_width} must equal embed_dim {network.embed_dim}: prior and decoder "
            f"take the caption's token states at that width; set both to one value"
        )


def check_unet(
    network: UNetSettings, image_size: int, path: str, size_path: str | None = None, context_length: int | None = None
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
            f"{size_path or path} {image_size} is not divisible by {halvings}, as the {levels} levels of "
            f"{path}.channels need; use {nearest_multiples(image_size, halvings)}, or fewer levels"
        )
    for level, (channels, attends) in enumerate(zip(network.channels, network.attention, strict=True)):
        if channels % network.norm_groups:
            raise UserError(
                f"{path}.channels[{level}] {channels} is not divisible by norm_groups {network.norm_groups}; "
                f"use {nearest_multiples(channels, network.norm_groups)}"
            )
        middle_attends = context_length is not None and level == levels - 1
        if (attends or middle_attends) and channels % network.attention_head_dim:
            raise UserError(
                f"{path}.channels[{level}] {channels} is not divisible by attention_head_dim "
                f"{network.attention_head_dim}; use {nearest_multiples(channels, network.attention_head_dim)}"
            )
        if context_length is None or not (attends or middle_attends):
            continue
        # diffusers pads the mask of the conditioning tokens to the spatial ones only where the two numbers differ.
        spatial_tokens = (image_size >> level) ** 2
        if spatial_tokens == context_length + CLIP_EXTRA_CONTEXT_TOKENS:
            raise UserError(
                f"{path}.attention[{level}] works on {spatial_tokens} picture tokens, which must differ from the "
                f"{spatial_tokens} conditioning tokens (CLIP's context_length {context_length} + "
                f"{CLIP_EXTRA_CONTEXT_TOKENS}): diffusers cannot tell them apart; "
                f"change the context_length or the image size"
            )


def check_upsampler(settings: UpsamplerSettings, path: str) -> None:
    """Raise `UserError` unless the network runs on both the crops and the whole picture, and the sizes go upwards."""
    if settings.low_size >= settings.high_size:
        raise UserError(
            f"{path}.low_size {settings.low_size} must be below high_size {settings.high_size}; "
            f"use for example {settings.high_size // 4} and {settings.high_size}"
        )
    if settings.crop_size > settings.high_size:
        raise UserError(
            f"{path}.crop_size {settings.crop_size} is larger than high_size {settings.high_size}; "
            f"use at most {settings.high_size}"
        )
    if (settings.crop_size * settings.low_size) % settings.high_size:
        step = settings.high_size // math.gcd(settings.high_size, settings.low_size)
        raise UserError(
            f"{path}.crop_size {settings.crop_size} is no whole number of low-resolution pixels at "
            f"{settings.low_size} -> {settings.high_size}; use {nearest_multiples(settings.crop_size, step)}"
        )
    check_unet(settings.network, settings.high_size, f"{path}.network", f"{path}.high_size")
    check_unet(settings.network, settings.crop_size, f"{path}.network", f"{path}.crop_size")


def check_diffusion(schedule: ScheduleSettings, objective: ObjectiveSettings, sampling_steps: int, path: str) -> None:
    """Raise `UserError` if the schedule has no valid betas, or the objective or the sampler does not fit it."""
    if schedule.kind is ScheduleKind.LINEAR and schedule.timesteps <= LINEAR_BETA_END_TIMES_TIMESTEPS:
        raise UserError(
            f"{path}.schedule.timesteps {schedule.timesteps} is too few for a linear schedule, which needs more than "
            f"{LINEAR_BETA_END_TIMES_TIMESTEPS}; use 1000, or kind cosine"
        )
    if schedule.zero_terminal_snr and objective.prediction_type is PredictionType.EPSILON:
        raise UserError(
            f"{path}.objective.prediction_type epsilon cannot be used with schedule.zero_terminal_snr true: the last "
            f"timestep is pure noise, from which epsilon gives no picture; use v_prediction or sample"
        )
    if sampling_steps > schedule.timesteps:
        raise UserError(
            f"{path}.sampler.steps {sampling_steps} is more than the schedule's {schedule.timesteps} timesteps; "
            f"use at most {schedule.timesteps}"
        )


def check_workflow(stages: Mapping[str, StageSettings]) -> None:
    """Raise `UserError` for whatever can be known to be wrong between the stages of one workflow before any runs."""
    clips = (each.settings for each in stages.values() if each.kind == "clip")
    clip = next((settings for settings in clips if isinstance(settings, ClipSettings)), None)
    kinds = {each.kind for each in stages.values()}
    for name, stage in stages.items():
        path = f"stage.{name}"
        match stage.settings:
            case PrepareSettings(data=data):
                _check_data(data, stages)
            case ClipSettings() as settings:
                check_clip_network(settings.network, f"{path}.network")
                if settings.max_samples == 0 and settings.checkpoint is None:
                    raise UserError(
                        f"{path}.max_samples=0 trains nothing; set {path}.checkpoint to replace the training"
                    )
            case PriorSettings() as settings:
                check_diffusion(settings.schedule, settings.objective, settings.sampler.steps, path)
            case DecoderSettings() as settings:
                check_diffusion(settings.schedule, settings.objective, settings.sampler.steps, path)
                context_length = clip.network.context_length if clip else None
                check_unet(
                    settings.network, settings.image_size, f"{path}.network", f"{path}.image_size", context_length
                )
                _check_condition(settings, kinds, path)
            case UpsamplerSettings() as settings:
                check_diffusion(settings.schedule, settings.objective, settings.sampler.steps, path)
                check_upsampler(settings, path)
    _check_chain(stages)


def _check_data(data: DataSettings, stages: Mapping[str, StageSettings]) -> None:
    """What is known of the data before it is prepared: that it is there, and enough for each stage."""
    if isinstance(data, WebDatasetSettings):
        expand_shards(data.parts, allow_shell_urls=data.allow_shell_urls)
    counts = split_counts(data)
    if counts is None:
        return
    for name, stage in stages.items():
        if isinstance(stage.settings, ClipSettings) and stage.settings.max_samples:
            check_batches_are_distinct(
                counts.training, stage.settings.global_batch_size, f"stage.{name}.global_batch_size"
            )


def _check_condition(settings: DecoderSettings, kinds: set[str], path: str) -> None:
    if settings.condition is DecoderCondition.IMAGE_EMBED and not {"embed", "prior"} <= kinds:
        raise UserError(
            f"{path}.condition=image_embed needs the stages embed and prior; use workflow=unclip, or "
            f"{path}.condition=text_embed"
        )
    if settings.condition is DecoderCondition.TEXT_EMBED and "prior" in kinds:
        raise UserError(
            f"{path}.condition=text_embed leaves the prior of this workflow without use; use workflow=glide, or "
            f"{path}.condition=image_embed"
        )


def _check_chain(stages: Mapping[str, StageSettings]) -> None:
    """Each upsampler begins at the size at which the decoder or the upsampler before it ends."""
    size, before = None, ""
    for name, stage in stages.items():
        if isinstance(stage.settings, DecoderSettings):
            size, before = stage.settings.image_size, f"stage.{name}.image_size"
    for name, stage in stages.items():
        if isinstance(stage.settings, UpsamplerSettings):
            if size is not None and stage.settings.low_size != size:
                raise UserError(
                    f"stage.{name}.low_size={stage.settings.low_size} does not continue {before}={size}; "
                    "make them equal"
                )
            size, before = stage.settings.high_size, f"stage.{name}.high_size"
