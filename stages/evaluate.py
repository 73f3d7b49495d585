"""The stage `evaluate`: what a whole run makes of captions that it never trained on."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import evaluation_loader
from pipeline.data.splits import Split
from pipeline.training.context import StageContext, StageResult
from pipeline.training.inference import inference_fabric
from stages.generation.grid import captioned_grid, to_pil
from stages.generation.text_to_image import Generated, GenerationOptions, TextToImage, chain_of_inputs
from stages.metrics import retrieval_recall
from stages.settings import EvaluateSettings

GRID_COLUMNS = 4


@torch.no_grad()
def run(context: StageContext) -> StageResult:
    """Sample from validation captions, compare with the real pictures in CLIP, and draw the grid."""
    settings = context.settings_as(EvaluateSettings)
    fabric = inference_fabric(context.frozen.trainer)
    chain = chain_of_inputs(context.inputs, fabric.device)
    final_size = chain.upsamplers[-1].settings.high_size if chain.upsamplers else chain.clip.settings.image_size
    images = CaptionedImages(context.input("data").path, final_size)
    samples = min(settings.samples, len(images.data.samples_in(Split.VALIDATION)))
    similarity = Similarities()
    cells, captions = [], []
    with fabric.autocast():
        for batch in _batches(images, settings, samples):
            generated = chain.generate(batch.caption, batch.sample_seed.tolist(), GenerationOptions())
            real = batch.to(fabric.device).image_signed()
            similarity.add(chain, batch.caption, real, generated)
            cells += _cells(real, generated)
            captions += batch.caption
            context.step(similarity.samples, samples, "sampling from validation captions")
    shown = settings.grid_captions
    captioned_grid(cells[:shown], captions[:shown], GRID_COLUMNS).save(context.output / "grid.png")
    context.tracker.log_picture(similarity.samples, "grid", context.output / "grid.png", captions[:shown])
    metrics = similarity.metrics(settings.retrieval_pool)
    context.tracker.log(similarity.samples, {f"evaluate/{name}": value for name, value in metrics.items()})
    return StageResult({"samples": samples}, metrics, samples)


def _batches(images: CaptionedImages, settings: EvaluateSettings, samples: int) -> Iterator[ImageBatch]:
    yield from evaluation_loader(images, split=Split.VALIDATION, batch_size=settings.batch_size, limit=samples)


def _cells(real: Tensor, generated: Generated) -> list[list[Image.Image]]:
    return [
        [to_pil(truth), to_pil(base), to_pil(final)]
        for truth, base, final in zip(real, generated.base, generated.final, strict=True)
    ]


class Similarities:
    """Cosines in the run's own CLIP, over the samples added so far."""

    def __init__(self) -> None:
        self._real: list[Tensor] = []
        self._text: list[Tensor] = []
        self._prior: list[Tensor] = []
        self._drawn: list[Tensor] = []

    @property
    def samples(self) -> int:
        """How many were added."""
        return sum(len(each) for each in self._text)

    def add(self, chain: TextToImage, captions: tuple[str, ...], real: Tensor, generated: Generated) -> None:
        """Add a batch of B: real pictures [B, 3, S, S] in [-1, 1] and what was made for their captions."""
        clip = chain.clip
        self._real.append(clip.encode_image(real).float())
        self._text.append(clip.encode_text(clip.tokenize(list(captions)).to(chain.device)).embed.float())
        self._prior.append(generated.image_embed.float())
        self._drawn.append(clip.encode_image(generated.final).float())

    def metrics(self, pool: int) -> dict[str, float]:
        """Mean cosines; `retrieval` says how well the drawn pictures find their captions, among `pool`."""
        real, text, prior, drawn = (torch.cat(each) for each in (self._real, self._text, self._prior, self._drawn))
        recall = retrieval_recall(F.normalize(drawn, dim=-1), F.normalize(text, dim=-1), pool)
        return {
            "sample_to_caption": float(F.cosine_similarity(drawn, text).mean()),
            "real_to_caption": float(F.cosine_similarity(real, text).mean()),
            "sample_to_other_caption": float(F.cosine_similarity(drawn, text.roll(1, 0)).mean()),
            "sample_to_real": float(F.cosine_similarity(drawn, real).mean()),
            "condition_to_real": float(F.cosine_similarity(prior, real).mean()),
            "condition_to_other_real": float(F.cosine_similarity(prior, real.roll(1, 0)).mean()),
            **{f"sample_{name}": value for name, value in recall.items()},
        }
