"""The stage `evaluate`: how good a run is, on pictures and captions that it never trained on."""

import shutil

import torch

from pipeline.data.batch import ImageBatch
from pipeline.forecast.rehearsal import Pass, Passes, Rehearsal
from pipeline.picture_grid import save_grid
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.clip.network import load_clip
from stages.evaluate.attributes import SPLIT_OF_GROUP
from stages.evaluate.evaluation import Evaluation, Sampled, Subject, grid_of, measured_size
from stages.evaluate.settings import EvaluateNumbers, EvaluateSettings
from stages.generation.options import GenerationOptions
from stages.generation.text_to_image import Generated, chain_of_inputs, untrained_chain
from stages.judge.network import load_judge
from stages.pictures import resize
from stages.weights import bytes_of

GRID = "grid.png"


@torch.no_grad()
def run(context: StageContext) -> StageResult:
    """Measure CLIP, prior, decoder and upsamplers, and draw the grid. One process does, whatever the trainer has."""
    settings = context.settings_as(EvaluateSettings)
    fabric = inference_fabric(context.frozen.trainer)
    chain = chain_of_inputs(context.inputs, fabric.device)
    judge, judge_clip = context.optional_input("judge"), context.optional_input("judge_clip")
    subject = Subject(
        chain.clip,
        chain,
        load_judge(judge, fabric.device) if judge else None,
        load_clip(judge_clip, device=fabric.device) if judge_clip else None,
    )
    images = context.images(measured_size(chain), cache_mib=0)
    evaluation = Evaluation(subject, images, settings, context.frozen.trainer.loader_workers, context.step)
    with fabric.autocast():
        metrics = {}
        if judge is not None:
            accuracy = evaluation.attributes()
            (context.output / "attributes.md").write_text(accuracy.table(), encoding="utf-8")
            metrics |= accuracy.metrics()
        sampled = evaluation.samples()
        _draw_grid(context, sampled, settings.grid_captions, evaluation.made)
        metrics |= sampled.metrics | evaluation.retrieval() | evaluation.zero_shot() | evaluation.upsampling()
    context.tracker.log(evaluation.made, {f"evaluate/{name}": value for name, value in metrics.items()})
    return StageResult(EvaluateNumbers(samples=evaluation.made), metrics, evaluation.made)


def rehearse(rehearsal: Rehearsal) -> Passes:
    """Making the pictures and enlarging real ones, for a forecast; what is measured on them comes on top."""
    settings, chain = rehearsal.settings_as(EvaluateSettings), untrained_chain(rehearsal)
    judged = len(SPLIT_OF_GROUP) * settings.judged_samples if rehearsal.optional_input("judge") else 0
    size = measured_size(chain)

    def generate(batch: ImageBatch) -> Generated:
        return chain.generate(batch.caption, batch.sample_seed.tolist(), GenerationOptions())

    def enlarge(batch: ImageBatch) -> None:
        enlarged = resize(batch.image_signed(), chain.upsamplers[0].settings.low_size)
        for upsampler in chain.upsamplers:
            enlarged = upsampler.sample(enlarged, batch.draws())

    passes = [Pass(generate, settings.samples + judged, settings.batch_size, size)]
    if chain.upsamplers:
        passes.append(Pass(enlarge, settings.samples, settings.batch_size, size))
    networks = [chain.decoder.network, *(each.network for each in chain.upsamplers)]
    networks += [chain.prior.network] if chain.prior else []
    return Passes(tuple(passes), None, weight_bytes=bytes_of(chain.clip, *networks))


def _draw_grid(context: StageContext, sampled: Sampled, captions: int, made: int) -> None:
    path = context.work / GRID
    grid = grid_of(sampled, captions)
    save_grid(grid.image, grid.layout, path)
    context.tracker.log_picture(made, "grid", path, grid.captions)
    shutil.copy(path, context.output / GRID)
