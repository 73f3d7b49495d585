"""The stage `export`: a run's weights and configs in one directory that needs nothing of this project."""

import json

import torch

from pipeline.forecast.rehearsal import Passes, Rehearsal
from pipeline.training.context import StageContext, StageResult
from stages.clip.settings import ClipNetworkSettings, not_in_stock_pipelines
from stages.export.settings import CONFIGS, ExportNumbers, ExportSettings
from stages.export.stock_pipeline import obstacle, save_stock_pipeline
from stages.export.transformers_clip import text_to_transformers, vision_to_transformers
from stages.generation.text_to_image import chain_of_inputs, untrained_chain
from stages.weights import bytes_of


@torch.no_grad()
def run(context: StageContext) -> StageResult:
    """Write diffusers' stock pipeline where the run fits it, and each network in diffusers' format where it does not.

    Further upsamplers go to `upsampler_<size>/`, CLIP's image tower to `image_encoder/`, every stage's config to
    `configs/<stage>.json`.
    """
    chain = chain_of_inputs(context.inputs, torch.device("cpu"))
    clip, prior, decoder, upsamplers = chain.clip, chain.prior, chain.decoder, list(chain.upsamplers)
    has_transformers_class = isinstance(clip.settings, ClipNetworkSettings)
    in_the_way = not_in_stock_pipelines(clip.settings) or obstacle(
        prior.settings if prior else None, decoder.settings, upsamplers[0].settings if upsamplers else None
    )
    if in_the_way is None:
        assert prior is not None, "as `obstacle` checked"
        save_stock_pipeline(context.output, clip, prior, decoder, upsamplers.pop(0))
    else:
        if has_transformers_class:
            text_to_transformers(clip).save_pretrained(context.output / "text_encoder")
        else:
            (context.output / "clip").mkdir()
            clip.save(context.output / "clip")
        decoder.network.save_parts(context.output)
        if prior is not None:
            prior.network.save_pretrained(context.output / "prior")
    for upsampler in upsamplers:
        upsampler.network.save_pretrained(context.output / f"upsampler_{upsampler.settings.high_size}")
    if has_transformers_class and context.settings_as(ExportSettings).include_clip_image_tower:
        vision_to_transformers(clip).save_pretrained(context.output / "image_encoder")
    _write_configs(context)
    return StageResult(ExportNumbers(stock_pipeline=in_the_way is None, not_stock_because=in_the_way))


def rehearse(rehearsal: Rehearsal) -> Passes:
    """The size of the networks that are written, for a forecast."""
    with torch.device("meta"):
        chain = untrained_chain(rehearsal)
    networks = [chain.decoder.network, *(each.network for each in chain.upsamplers)]
    networks += [chain.prior.network] if chain.prior else []
    clip_bytes, image_tower_bytes = bytes_of(chain.clip), bytes_of(chain.clip.network.visual)
    has_image_tower = rehearsal.settings_as(ExportSettings).include_clip_image_tower
    return Passes((), bytes_of(*networks) + clip_bytes - (0 if has_image_tower else image_tower_bytes))


def _write_configs(context: StageContext) -> None:
    """Every stage's settings, and which artifact they belong to."""
    directory = context.output / CONFIGS
    directory.mkdir()
    for artifact in (each for found in context.inputs.values() for each in found):
        manifest = artifact.manifest
        content = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "settings": manifest.config}
        (directory / f"{manifest.stage}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
