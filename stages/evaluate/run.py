"""The stage `evaluate`: how good a run is, on pictures and captions that it never trained on."""

import shutil
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import rows_loader
from pipeline.data.splits import Split
from pipeline.forecast.rehearsal import Pass, Passes, Rehearsal
from pipeline.picture_grid import save_grid
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, load_clip
from stages.clip.retrieval import retrieval_recall
from stages.evaluate.attributes import MEAN, SPLIT_OF_GROUP, AttributeAccuracy, judged_rows
from stages.evaluate.metric import Embeds, InClip, Made
from stages.evaluate.settings import METRICS, EvaluateNumbers, EvaluateSettings
from stages.generation.grid import captioned_grid, to_pil
from stages.generation.options import GenerationOptions
from stages.generation.text_to_image import Generated, TextToImage, chain_of_inputs, untrained_chain
from stages.judge.labels import true_labels
from stages.judge.network import load_judge
from stages.pictures import peak_signal_to_noise, resize
from stages.weights import bytes_of

GRID, GRID_COLUMNS = "grid.png", 4


@torch.no_grad()
def run(context: StageContext) -> StageResult:
    """Measure CLIP, prior, decoder and upsamplers, and draw the grid."""
    settings = context.settings_as(EvaluateSettings)
    fabric = inference_fabric(context.frozen.trainer)
    chain = chain_of_inputs(context.inputs, fabric.device)
    final_size = chain.upsamplers[-1].settings.high_size if chain.upsamplers else chain.clip.settings.image_size
    evaluation = Evaluation(context, settings, chain, context.images(final_size, cache_mib=0))
    with fabric.autocast():
        metrics = evaluation.attributes() | evaluation.samples() | evaluation.retrieval() | evaluation.upsampling()
    context.tracker.log(evaluation.made, {f"evaluate/{name}": value for name, value in metrics.items()})
    return StageResult(EvaluateNumbers(samples=evaluation.made), metrics, evaluation.made)


def rehearse(rehearsal: Rehearsal) -> Passes:
    """Making the pictures and enlarging real ones, for a forecast; what is measured on them comes on top."""
    settings, chain = rehearsal.settings_as(EvaluateSettings), untrained_chain(rehearsal)
    judged = len(SPLIT_OF_GROUP) * settings.judged_samples if rehearsal.optional_input("judge") else 0
    final_size = chain.upsamplers[-1].settings.high_size if chain.upsamplers else chain.clip.settings.image_size

    def generate(batch: ImageBatch) -> Generated:
        return chain.generate(batch.caption, batch.sample_seed.tolist(), GenerationOptions())

    def enlarge(batch: ImageBatch) -> None:
        enlarged = resize(batch.image_signed(), chain.upsamplers[0].settings.low_size)
        for upsampler in chain.upsamplers:
            enlarged = upsampler.sample(enlarged, batch.draws())

    passes = [Pass(generate, settings.samples + judged, settings.batch_size, final_size)]
    if chain.upsamplers:
        passes.append(Pass(enlarge, settings.samples, settings.batch_size, final_size))
    networks = [chain.decoder.network, *(each.network for each in chain.upsamplers)]
    networks += [chain.prior.network] if chain.prior else []
    return Passes(tuple(passes), None, weight_bytes=bytes_of(chain.clip, *networks))


class Evaluation:
    """The measurements of one run; `made` counts the pictures that were made for them."""

    def __init__(
        self, context: StageContext, settings: EvaluateSettings, chain: TextToImage, images: CaptionedImages
    ) -> None:
        self.made = 0
        self._context = context
        self._settings = settings
        self._chain = chain
        self._images = images
        is_judged = context.optional_input("judge") is not None
        self._judged_rows = judged_rows(images, settings.judged_samples) if is_judged else {}
        self._sampled_rows = _spread(images.data.samples_in(Split.VALIDATION), settings.samples)
        self._to_make = len(self._sampled_rows) + sum(map(len, self._judged_rows.values()))

    def attributes(self) -> dict[str, float]:
        """What the judge reads off pictures of fully described single objects, at both resolutions; {} without one."""
        judge_artifact = self._context.optional_input("judge")
        if judge_artifact is None:
            return {}
        judge = load_judge(judge_artifact, self._chain.device)
        accuracy = AttributeAccuracy()
        for group, rows in self._judged_rows.items():
            for batch, generated in self._generated(rows, f"{group} pairs for the judge"):
                truth = true_labels(self._images, batch.sample.tolist())
                real = batch.image_signed()
                pictures = {
                    "base": generated.base,
                    "final": generated.final,
                    "real_base": resize(real, generated.base.shape[-1]),
                    "real_final": real,
                }
                for name, picture in pictures.items():
                    accuracy.add(f"{group}/{name}", judge.read(picture).cpu() == truth)
        (self._context.output / "attributes.md").write_text(accuracy.table(), encoding="utf-8")
        metrics = accuracy.metrics()
        most_telling = [f"{group}/{name}/{MEAN}" for name in ("final", "base") for group in self._judged_rows]
        return {name: metrics[name] for name in most_telling} | metrics

    def samples(self) -> dict[str, float]:
        """The metrics of pictures made from validation captions, beside the real ones; the grid."""
        metrics = [METRICS[name]() for name in self._settings.metrics]
        embedded = {"": Embedded(self._chain.clip)}
        judge_clip = self._context.optional_input("judge_clip")
        if judge_clip is not None:
            embedded["judge_clip/"] = Embedded(load_clip(judge_clip, device=self._chain.device))
        sampled, captions, seeds = [], [], []
        pictures: dict[str, list[Image.Image]] = {"real": [], "base": [], "final": []}
        for batch, generated in self._generated(self._sampled_rows, "validation captions"):
            made = Made(batch.caption, batch.image_signed(), generated.base, generated.final)
            for each in (*embedded.values(), *metrics):
                each.add(made)
            sampled.append(generated.image_embed.float())
            for name, found in pictures.items():
                found += map(to_pil, getattr(made, name))
            captions += batch.caption
            seeds += batch.sample_seed.tolist()
        self._draw_grid(pictures, captions, seeds)
        embeds = Embeds(
            {name: each.all() for name, each in embedded.items()},
            torch.cat(sampled) if self._chain.prior else None,
            self._settings.retrieval_pool,
        )
        return {name: value for metric in metrics for name, value in metric.results(embeds).items()}

    def retrieval(self) -> dict[str, float]:
        """How well CLIP finds real pictures by their captions and captions by their pictures, on validation pairs."""
        rows = _spread(self._images.data.samples_in(Split.VALIDATION), self._settings.retrieval_samples)
        clip, captions = self._chain.clip, CaptionEncoder(self._chain.clip)
        image_embeds, text_embeds = [], []
        for batch in self._batches(rows):
            image_embeds.append(clip.encode_image(batch.image_signed()).float())
            text_embeds.append(captions.encode(batch.caption).embed.float())
            self._context.step(self.made, self._to_make, "retrieval")
        recall = retrieval_recall(
            F.normalize(torch.cat(image_embeds), dim=-1),
            F.normalize(torch.cat(text_embeds), dim=-1),
            self._settings.retrieval_pool,
        )
        return {f"clip/{name}": value for name, value in recall.items()}

    def upsampling(self) -> dict[str, float]:
        """PSNR of real pictures, reduced and enlarged again: by the upsamplers, and by plain bicubic interpolation."""
        if not self._chain.upsamplers:
            return {}
        drawn = bicubic = 0.0
        for batch in self._batches(self._sampled_rows):
            real = batch.image_signed()
            low = resize(real, self._chain.upsamplers[0].settings.low_size)
            enlarged = low
            for upsampler in self._chain.upsamplers:
                enlarged = upsampler.sample(enlarged, batch.draws())
            share = len(batch) / len(self._sampled_rows)
            drawn += share * peak_signal_to_noise(enlarged, real)
            bicubic += share * peak_signal_to_noise(resize(low, real.shape[-1]), real)
            self._context.step(self.made, self._to_make, "upsampling")
        return {"upsampler/psnr_db": drawn, "upsampler/psnr_bicubic_db": bicubic}

    def _generated(self, rows: NDArray[np.int64], activity: str) -> Iterator[tuple[ImageBatch, Generated]]:
        for batch in self._batches(rows):
            generated = self._chain.generate(batch.caption, batch.sample_seed.tolist(), GenerationOptions())
            self.made += len(batch)
            self._context.step(self.made, self._to_make, activity)
            yield batch, generated

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[ImageBatch]:
        device = self._chain.device
        loader = rows_loader(
            self._images,
            [rows],
            batch_size=self._settings.batch_size,
            workers=self._context.frozen.trainer.loader_workers,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            yield batch.to(device, non_blocking=True)

    def _draw_grid(self, pictures: dict[str, list[Image.Image]], captions: list[str], seeds: list[int]) -> None:
        shown = _spread(np.arange(len(captions)), self._settings.grid_captions).tolist()
        chosen = {name: [found[place] for place in shown] for name, found in pictures.items()}
        shown_captions = [captions[place] for place in shown]
        grid = captioned_grid(chosen, shown_captions, [seeds[place] for place in shown], columns=GRID_COLUMNS)
        path = self._context.work / GRID
        save_grid(grid.image, grid.layout, path)
        self._context.tracker.log_picture(self.made, "grid", path, shown_captions)
        shutil.copy(path, self._context.output / GRID)


class Embedded:
    """Collects the embeddings of captions, real pictures and those made from the captions, in one CLIP."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip
        self._captions = CaptionEncoder(clip)
        self._found: list[tuple[Tensor, ...]] = []

    def add(self, made: Made) -> None:
        """Embed a batch."""
        text = self._captions.encode(made.captions).embed
        embeds = text, self._clip.encode_image(made.real), self._clip.encode_image(made.final)
        self._found.append(tuple(F.normalize(each.float(), dim=-1) for each in embeds))

    def all(self) -> InClip:
        """Those of all batches."""
        return InClip(*map(torch.cat, zip(*self._found, strict=True)))


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the rows, evenly over them: neighbours in an index are often alike."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]
