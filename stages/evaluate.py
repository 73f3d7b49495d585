"""The stage `evaluate`: how good a run is, on pictures and captions that it never trained on."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.draws import SampleDraws
from pipeline.data.loader import rows_loader
from pipeline.data.splits import Split
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.attribute_accuracy import MEAN, AttributeAccuracy, judged_rows, true_labels
from stages.generation.grid import captioned_grid, to_pil
from stages.generation.text_to_image import Generated, GenerationOptions, TextToImage, chain_of_inputs
from stages.metrics import frechet_distance, peak_signal_to_noise, retrieval_recall
from stages.models.captions import CaptionEncoder
from stages.models.clip import ClipModel
from stages.models.saved import load_clip, load_judge
from stages.models.upsampler import upsample_condition
from stages.settings import EvaluateSettings

GRID_COLUMNS = 4
PICTURES = ("real", "base", "final")


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
    return StageResult({"samples": evaluation.made}, metrics, evaluation.made)


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
                    "real_base": upsample_condition(real, generated.base.shape[-1]),
                    "real_final": real,
                }
                for name, picture in pictures.items():
                    accuracy.add(f"{group}/{name}", judge.read(picture).cpu() == truth)
        (self._context.output / "attributes.md").write_text(accuracy.table(), encoding="utf-8")
        metrics = accuracy.metrics()
        most_telling = [f"{group}/{name}/{MEAN}" for name in ("final", "base") for group in self._judged_rows]
        return {name: metrics[name] for name in most_telling} | metrics

    def samples(self) -> dict[str, float]:
        """Pictures from validation captions beside the real ones: cosines, retrieval, Fréchet distance; the grid."""
        own = Similarities(self._chain.clip)
        judge_clip = self._context.optional_input("judge_clip")
        foreign = Similarities(load_clip(judge_clip, device=self._chain.device)) if judge_clip else None
        embeds, cells, captions, seeds = [], [], [], []
        for batch, generated in self._generated(self._sampled_rows, "validation captions"):
            real = batch.image_signed()
            for similarities in (own, foreign):
                if similarities is not None:
                    similarities.add(batch.caption, real, generated.final)
            embeds.append(generated.image_embed.float())
            cells += _cells(real, generated)
            captions += batch.caption
            seeds += batch.sample_seed.tolist()
        self._draw_grid(cells, captions, seeds)
        metrics = own.metrics(self._settings.retrieval_pool)
        if self._chain.prior is not None:
            metrics |= own.of_prior(torch.cat(embeds))
        if foreign is not None:
            of_foreign = foreign.metrics(self._settings.retrieval_pool) | foreign.frechet()
            metrics |= {f"judge_clip/{name}": value for name, value in of_foreign.items()}
        return metrics

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
            low = upsample_condition(real, self._chain.upsamplers[0].settings.low_size)
            enlarged = low
            for upsampler in self._chain.upsamplers:
                enlarged = upsampler.sample(enlarged, SampleDraws(batch.sample_seed))
            share = len(batch) / len(self._sampled_rows)
            drawn += share * peak_signal_to_noise(enlarged, real)
            bicubic += share * peak_signal_to_noise(upsample_condition(low, real.shape[-1]), real)
            self._context.step(self.made, self._to_make, "upsampling")
        return {"upsampler/psnr_db": drawn, "upsampler/psnr_bicubic_db": bicubic}

    def _generated(self, rows: NDArray[np.int64], activity: str) -> Iterator[tuple[ImageBatch, Generated]]:
        for batch in self._batches(rows):
            generated = self._chain.generate(batch.caption, batch.sample_seed.tolist(), GenerationOptions())
            self.made += len(batch)
            self._context.step(self.made, self._to_make, activity)
            yield batch, generated

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[ImageBatch]:
        for batch in rows_loader(self._images, rows, batch_size=self._settings.batch_size):
            yield batch.to(self._chain.device)

    def _draw_grid(self, cells: list[list[Image.Image]], captions: list[str], seeds: list[int]) -> None:
        shown = _spread(np.arange(len(cells)), self._settings.grid_captions)
        path = self._context.output / "grid.png"
        shown_captions = [captions[place] for place in shown]
        captioned_grid(
            [cells[place] for place in shown],
            shown_captions,
            GRID_COLUMNS,
            names=PICTURES,
            seeds=[seeds[place] for place in shown],
        ).save(path)
        self._context.tracker.log_picture(self.made, "grid", path, shown_captions)


class Similarities:
    """Cosines in one CLIP between captions, real pictures and those made from the captions."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip
        self._captions = CaptionEncoder(clip)
        self._real: list[Tensor] = []
        self._text: list[Tensor] = []
        self._made: list[Tensor] = []

    def add(self, captions: tuple[str, ...], real: Tensor, made: Tensor) -> None:
        """Add B captions, their real pictures and those that were made, float [B, 3, S, S] in [-1, 1] each."""
        self._real.append(F.normalize(self._clip.encode_image(real).float(), dim=-1))
        self._text.append(F.normalize(self._captions.encode(captions).embed.float(), dim=-1))
        self._made.append(F.normalize(self._clip.encode_image(made).float(), dim=-1))

    def metrics(self, pool: int) -> dict[str, float]:
        """Mean cosines; `sample_R@...` says how well the pictures find their captions, among `pool`."""
        real, text, made = (torch.cat(each) for each in (self._real, self._text, self._made))
        return {
            "sample_to_caption": float((made * text).sum(1).mean()),
            "real_to_caption": float((real * text).sum(1).mean()),
            "sample_to_other_caption": float((made * text.roll(1, 0)).sum(1).mean()),
            "sample_to_real": float((made * real).sum(1).mean()),
            **{f"sample_{name}": value for name, value in retrieval_recall(made, text, pool).items()},
        }

    def of_prior(self, sampled: Tensor) -> dict[str, float]:
        """Mean cosines of the prior's embeddings float [N, E] to the true image's, another image's, the caption's."""
        real, text = torch.cat(self._real), torch.cat(self._text)
        return {
            "prior/to_image": float(F.cosine_similarity(sampled, real).mean()),
            "prior/to_other_image": float(F.cosine_similarity(sampled, real.roll(1, 0)).mean()),
            "prior/to_caption": float(F.cosine_similarity(sampled, text).mean()),
            "prior/caption_to_image": float((text * real).sum(1).mean()),
        }

    def frechet(self) -> dict[str, float]:
        """Fréchet distance of half of the made pictures from the other half's real ones, and of the real halves.

        Halves, so that both distances are of equally many pictures and none is of a caption with itself.
        """
        real, made = torch.cat(self._real), torch.cat(self._made)
        if len(real) < 4:
            return {}
        return {
            "frechet": frechet_distance(made[::2], real[1::2]),
            "frechet_of_real": frechet_distance(real[::2], real[1::2]),
        }


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the rows, evenly over them: neighbours in an index are often alike."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def _cells(real: Tensor, generated: Generated) -> list[list[Image.Image]]:
    return [
        [to_pil(truth), to_pil(base), to_pil(final)]
        for truth, base, final in zip(real, generated.base, generated.final, strict=True)
    ]
