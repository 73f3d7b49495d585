"""A run's networks for diffusers' stock unCLIP pipelines, which load them with no code of this project."""

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from torch import nn

from stages.clip.network import ClipModel
from stages.decoder.network import UNetDecoder
from stages.decoder.sample import DecoderSampler
from stages.decoder.text_proj import TextProjection
from stages.diffusion.settings import DiffusionStageSettings
from stages.export.transformers_clip import (
    image_processor_of,
    text_to_transformers,
    tokenizer_of,
    vision_to_transformers,
)
from stages.prior.sample import PriorSampler
from stages.upsampler.sample import UpsamplerSampler

TEXT_PROJ_CLASS = ["diffusers.pipelines.deprecated.unclip.text_proj", "UnCLIPTextProjModel"]
"""Where stock diffusers (0.38 and later) finds the class; what `save_pretrained` writes by itself does not load."""
PIPELINES = Path(__file__).parent / "pipelines"
"""Pipelines that take their defaults from the run; they go along with it."""
_LEAST_STEPS = 2
"""`UnCLIPScheduler` divides by the number of steps less one."""


def save_stock_pipeline(
    directory: Path,
    clip: ClipModel,
    prior: PriorSampler,
    decoder: DecoderSampler,
    upsampler: UpsamplerSampler,
    *,
    dtype: torch.dtype = torch.float32,
    with_image_tower: bool = True,
) -> None:
    """Write a directory for `UnCLIPPipeline` and, with the image tower, for `UnCLIPImageVariationPipeline`.

    Call only where `stages.export.obstacle` sees none. The pipelines sample with ancestral steps; `super_res_last`,
    which takes only their last step, is a copy. Each of the two leaves out what only the other one has a place for.
    """
    assert isinstance(decoder.network, UNetDecoder), "as `obstacle` checked"
    pipeline = UnCLIPPipeline(
        prior=prior.network,
        decoder=_with_learned_range(decoder.network.unet),
        text_encoder=text_to_transformers(clip),
        tokenizer=tokenizer_of(clip),
        text_proj=_stock_text_proj(decoder.network.plain_text_proj()),
        super_res_first=upsampler.network,
        super_res_last=upsampler.network,
        prior_scheduler=_scheduler(prior.settings, clip_range=prior.settings.sampler.clip_sample_range),
        decoder_scheduler=_scheduler(decoder.settings, variance_type="learned_range"),
        super_res_scheduler=_scheduler(upsampler.settings),
    )
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            setattr(pipeline, name, in_dtype(part, dtype))
    pipeline.save_pretrained(directory, safe_serialization=True)
    _load_as_float32(directory / "text_encoder")
    _add_to_index(directory, {"text_proj": TEXT_PROJ_CLASS, "sampling": sampling_of(prior, decoder, upsampler)})
    shutil.copy(PIPELINES / "text_to_image.py", directory)
    if with_image_tower:
        in_dtype(vision_to_transformers(clip), dtype).save_pretrained(directory / "image_encoder")
        _load_as_float32(directory / "image_encoder")
        image_processor_of(clip).save_pretrained(directory / "feature_extractor")
        classes = {"image_encoder": "CLIPVisionModelWithProjection", "feature_extractor": "CLIPImageProcessor"}
        _add_to_index(directory, {name: ["transformers", kind] for name, kind in classes.items()})
        shutil.copy(PIPELINES / "image_variation.py", directory)


def sampling_of(prior: PriorSampler, decoder: DecoderSampler, upsampler: UpsamplerSampler) -> dict[str, float]:
    """What `UnCLIPPipeline.__call__` must be given to sample as the run is sampled, as far as it can."""
    samplers = {"prior": prior.settings.sampler, "decoder": decoder.settings.sampler}
    scales = {f"{name}_guidance_scale": each.guidance_scale for name, each in samplers.items()}
    steps = {name: each.steps for name, each in {**samplers, "super_res": upsampler.settings.sampler}.items()}
    return {**scales, **{f"{name}_num_inference_steps": max(each, _LEAST_STEPS) for name, each in steps.items()}}


def in_dtype(network: nn.Module, dtype: torch.dtype) -> Any:
    """The network itself where it has that type already, else a copy in it."""
    if all(each.dtype is dtype for each in network.parameters()):
        return network
    # Past diffusers' own `to`, which warns of networks that keep some layers in float32; none of these does.
    return nn.Module.to(deepcopy(network), dtype=dtype)


def _load_as_float32(tower: Path) -> None:
    """transformers' part of a pipeline is loaded as its config says, diffusers' as float32, where nothing is asked."""
    config_file = tower / "config.json"
    config = {**json.loads(config_file.read_text(encoding="utf-8")), "dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _add_to_index(directory: Path, entries: Mapping[str, Any]) -> None:
    index_file = directory / "model_index.json"
    index = {**json.loads(index_file.read_text(encoding="utf-8")), **entries}
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stock_text_proj(ours: TextProjection) -> UnCLIPTextProjModel:
    stock = UnCLIPTextProjModel(**ours.sizes)
    stock.load_state_dict(ours.state_dict())
    return stock.eval()


def _with_learned_range(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The pipeline's guidance splits off three channels of variance: -1 in each is the fixed small one, exactly."""
    wide = UNet2DConditionModel.from_config({**unet.config, "out_channels": 6})
    assert isinstance(wide, UNet2DConditionModel)
    weights = dict(unet.state_dict())
    weight, bias = weights["conv_out.weight"], weights["conv_out.bias"]
    weights["conv_out.weight"] = torch.cat([weight, torch.zeros_like(weight)])
    weights["conv_out.bias"] = torch.cat([bias, torch.full_like(bias, -1.0)])
    wide.load_state_dict(weights)
    return wide.eval()


def _scheduler(
    settings: DiffusionStageSettings, clip_range: float = 1.0, variance_type: str = "fixed_small_log"
) -> UnCLIPScheduler:
    return UnCLIPScheduler(
        num_train_timesteps=settings.schedule.timesteps,
        variance_type=variance_type,  # pyright: ignore[reportArgumentType]
        clip_sample_range=clip_range,
        prediction_type=settings.objective.prediction_type.value,  # pyright: ignore[reportArgumentType]
    )
