"""A run's networks as diffusers' stock `UnCLIPPipeline`, which loads them with no code of this project."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from transformers import CLIPTokenizer

from stages.clip.network import ClipModel, bpe_vocabulary
from stages.decoder.network import UNetDecoder
from stages.decoder.networks.unet import UNetDecoderSettings
from stages.decoder.sample import DecoderSampler
from stages.decoder.settings import DecoderCondition, DecoderSettings
from stages.diffusion.settings import DiffusionStageSettings, PredictionType, ScheduleKind
from stages.export.transformers_clip import text_to_transformers
from stages.prior.sample import PriorSampler
from stages.prior.settings import PriorSettings
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerSettings

TEXT_PROJ_CLASS = ["diffusers.pipelines.deprecated.unclip.text_proj", "UnCLIPTextProjModel"]
"""Where stock diffusers (0.38 and later) finds the class; what `save_pretrained` writes by itself does not load."""


def obstacle(prior: PriorSettings | None, decoder: DecoderSettings, upsampler: UpsamplerSettings | None) -> str | None:
    """Why the stock pipeline cannot hold networks of these settings; None if it can."""
    if prior is None or decoder.condition is not DecoderCondition.IMAGE_EMBED:
        return "it needs a prior, and a decoder on image embeddings"
    if not isinstance(decoder.network, UNetDecoderSettings):
        return "its decoder is a U-Net, and this one is another network"
    if upsampler is None:
        return "it needs an upsampler"
    for name, settings in (("prior", prior), ("decoder", decoder), ("upsampler", upsampler)):
        if settings.schedule.kind is not ScheduleKind.COSINE or settings.schedule.zero_terminal_snr:
            return f"its scheduler knows the cosine schedule alone, and that of the {name} is another"
        if settings.objective.prediction_type is PredictionType.V_PREDICTION:
            return f"its scheduler knows no v_prediction, and the {name} predicts v"
    return None


def save_stock_pipeline(
    directory: Path, clip: ClipModel, prior: PriorSampler, decoder: DecoderSampler, upsampler: UpsamplerSampler
) -> None:
    """Write a directory for `UnCLIPPipeline.from_pretrained`. Call only where `obstacle` is None.

    The pipeline samples with ancestral steps; `super_res_last`, which takes only its last step, is a copy.
    """
    assert isinstance(decoder.network, UNetDecoder), "as `obstacle` checked"
    pipeline = UnCLIPPipeline(
        prior=prior.network,
        decoder=_with_learned_range(decoder.network.unet),
        text_encoder=text_to_transformers(clip),
        tokenizer=_tokenizer(clip.settings.context_length),
        text_proj=decoder.network.plain_text_proj(),
        super_res_first=upsampler.network,
        super_res_last=upsampler.network,
        prior_scheduler=_scheduler(prior.settings, clip_range=prior.settings.sampler.clip_sample_range),
        decoder_scheduler=_scheduler(decoder.settings, variance_type="learned_range"),
        super_res_scheduler=_scheduler(upsampler.settings),
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    index_file = directory / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["text_proj"] = TEXT_PROJ_CLASS
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def _tokenizer(context_length: int) -> CLIPTokenizer:
    vocabulary = bpe_vocabulary()
    return CLIPTokenizer(
        vocab=dict(vocabulary.ids), merges=cast(Any, list(vocabulary.merges)), model_max_length=context_length
    )
