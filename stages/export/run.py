"""The stage `export`: a run's weights and configs in one directory that needs nothing of this project."""

import json

import torch

from pipeline.training.context import StageContext, StageResult
from stages.clip.network import load_clip
from stages.decoder.network import UNetDecoder, load_decoder
from stages.decoder.settings import DecoderNumbers, DecoderSettings
from stages.export.settings import CONFIGS, ExportNumbers, ExportSettings
from stages.export.stock_pipeline import StockNetworks, obstacle, save_stock_pipeline
from stages.export.transformers_clip import text_to_transformers, vision_to_transformers
from stages.generation.text_to_image import in_chain
from stages.prior.network import load_prior
from stages.prior.settings import PriorSettings
from stages.upsampler.network import load_upsampler
from stages.upsampler.settings import UpsamplerNumbers, UpsamplerSettings


@torch.no_grad()
def run(context: StageContext) -> StageResult:
    """Write diffusers' stock pipeline where the run fits it, and each network in diffusers' format where it does not.

    Further upsamplers go to `upsampler_<size>/`, CLIP's image tower to `image_encoder/`, every stage's config to
    `configs/<stage>.json`.
    """
    settings = context.settings_as(ExportSettings)
    clip_artifact, decoder_artifact = context.input("clip"), context.input("decoder")
    prior_artifact = context.optional_input("prior")
    chain = in_chain(context.inputs["upsampler"], decoder_artifact.numbers(DecoderNumbers).image_size)
    clip = load_clip(clip_artifact)
    decoder = load_decoder(decoder_artifact, clip_artifact)
    prior = load_prior(prior_artifact, clip_artifact) if prior_artifact else None
    upsamplers = [load_upsampler(each) for each in chain]
    its_prior = prior_artifact.settings(PriorSettings) if prior_artifact else None
    its_decoder = decoder_artifact.settings(DecoderSettings)
    first = chain[0].settings(UpsamplerSettings) if chain else None
    in_the_way = obstacle(its_prior, its_decoder, first)
    if in_the_way is None:
        assert prior is not None, "as `obstacle` checked"
        assert its_prior is not None, "as `obstacle` checked"
        assert first is not None, "as `obstacle` checked"
        assert isinstance(decoder, UNetDecoder), "as `obstacle` checked"
        networks = StockNetworks(clip, prior, its_prior, decoder, its_decoder, upsamplers[0], first)
        save_stock_pipeline(context.output, networks)
        upsamplers, chain = upsamplers[1:], chain[1:]
    else:
        text_to_transformers(clip).save_pretrained(context.output / "text_encoder")
        decoder.save_parts(context.output)
        if prior is not None:
            prior.save_pretrained(context.output / "prior")
    for upsampler, artifact in zip(upsamplers, chain, strict=True):
        upsampler.save_pretrained(context.output / f"upsampler_{artifact.numbers(UpsamplerNumbers).high_size}")
    if settings.include_clip_image_tower:
        vision_to_transformers(clip).save_pretrained(context.output / "image_encoder")
    _write_configs(context)
    return StageResult(ExportNumbers(stock_pipeline=in_the_way is None, not_stock_because=in_the_way))


def _write_configs(context: StageContext) -> None:
    """Every stage's settings, and which artifact they belong to."""
    directory = context.output / CONFIGS
    directory.mkdir()
    for artifact in (each for found in context.inputs.values() for each in found):
        manifest = artifact.manifest
        content = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "settings": manifest.config}
        (directory / f"{manifest.stage}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
