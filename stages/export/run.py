"""The stage `export`: a run's weights and configs in one directory that needs nothing of this project."""

import torch

from pipeline.forecast.rehearsal import Passes, Rehearsal
from pipeline.training.context import StageContext, StageResult
from stages.export.card import Card, write_card
from stages.export.settings import Dtype, ExportFormat, ExportNumbers, ExportSettings
from stages.export.write import write_chain, write_configs
from stages.generation.text_to_image import chain_of_inputs, untrained_chain
from stages.weights import CPU, bytes_of


def run(context: StageContext) -> StageResult:
    """Write the run for diffusers' stock pipelines where it fits them, and network by network where it does not.

    Every stage's config goes to `configs/<stage>.json`.
    """
    has_image_tower = context.settings_as(ExportSettings).include_clip_image_tower
    in_the_way = write_chain(context.output, chain_of_inputs(context.inputs, CPU), with_image_tower=has_image_tower)
    artifacts = tuple(each for found in context.inputs.values() for each in found)
    write_configs(context.output, artifacts)
    if in_the_way is None:
        write_card(context.output, Card(context.frozen.run, ExportFormat.DIFFUSERS, Dtype.FP32, artifacts, artifacts))
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
