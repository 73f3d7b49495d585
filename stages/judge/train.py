"""The stage `judge`: learns from real pictures to read what is in them, so that `evaluate` can hold samples to it."""

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages, MadeAhead
from pipeline.data.make import make_prepared
from pipeline.data.splits import Split
from pipeline.data.write import pack
from pipeline.forecast.rehearsal import ROWS, Rehearsal, Training
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, StageModule
from pipeline.workflow.progress import CHECKPOINTS
from stages.judge.labels import CLASSES, judge_samples, true_labels
from stages.judge.network import Judge
from stages.judge.settings import JudgeDataSettings, JudgeNumbers, JudgeSettings
from stages.pictures import resize

NOISE = "noise"
DRAWN_TO_TRY = 64


def run(context: StageContext) -> StageResult:
    """Draw single objects of all pairs, train on them, and say how often the judge is right about held-out ones."""
    settings = context.settings_as(JudgeSettings)
    # Each process draws the same ones for itself: nothing tells the others when the first one's are complete.
    data = context.work / CHECKPOINTS / f"data-of-process-{context.process.rank}"
    make_prepared(data, _drawn(context, settings.data), settings.data.shard_samples)
    ahead = MadeAhead(normals={NOISE: (3, settings.image_size, settings.image_size)})
    images = CaptionedImages(data, settings.data.image_size, context.frozen.trainer.cache_mib, ahead=ahead)
    with context.building():
        judge = Judge(settings)
    result = fit(context, JudgeModule(judge, settings, true_labels(images, range(len(images)))), images)
    context.save(judge)
    return StageResult(JudgeNumbers(attributes=tuple(CLASSES)), result.metrics, result.samples_seen)


def rehearse(rehearsal: Rehearsal) -> Training:
    """The judge, for a forecast, and how long it takes here to draw what it learns from."""
    settings = rehearsal.settings_as(JudgeSettings)
    with rehearsal.building():
        judge = Judge(settings)
    labels_of_rows = torch.zeros((ROWS, len(CLASSES)), dtype=torch.int64)
    started, tried = time.monotonic(), len(list(islice(judge_samples(settings.data), DRAWN_TO_TRY)))
    setup_s = (time.monotonic() - started) / tried * (settings.data.samples + settings.data.validation_samples)
    return Training(JudgeModule(judge, settings, labels_of_rows), settings.data.image_size, setup_s=setup_s)


def _drawn(context: StageContext, settings: JudgeDataSettings) -> Iterator[tuple[bytes, Split]]:
    for number, (sample, split) in enumerate(judge_samples(settings), 1):
        context.step(number, 0, f"{number:,} pictures made")
        yield pack(sample), split


class JudgeModule(StageModule[Judge]):
    """Trains the judge by cross-entropy on every attribute."""

    def __init__(self, judge: Judge, settings: JudgeSettings, labels_of_rows: Tensor) -> None:
        super().__init__(judge, settings)
        self.settings = settings
        self._labels = labels_of_rows

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The cross-entropy, summed over attributes, of noised pictures that were reduced to one of `seen_at` sizes."""
        settings, draws = self.settings, batch.draws()
        size_of_sample = draws.integer("size", len(settings.seen_at))
        image = batch.image_signed()
        seen = torch.empty_like(resize(image, settings.image_size))
        for place, size in enumerate(settings.seen_at):
            chosen = (size_of_sample == place).nonzero().squeeze(1)
            if len(chosen):
                seen[chosen] = resize(resize(image[chosen], size), settings.image_size)
        strength = settings.max_noise * draws.uniform("noise strength")[:, None, None, None]
        logits = self.network(seen + strength * draws.normal(NOISE, seen.shape[1:]))
        truth = self._labels[batch.sample].to(self.device)
        return {LOSS: torch.stack([F.cross_entropy(each, truth[:, a]) for a, each in enumerate(logits)]).sum()}

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Accuracy on held-out pictures without noise, at each of the sizes."""
        right: dict[int, list[Tensor]] = {size: [] for size in self.settings.seen_at}
        for batch in batches:
            truth = self._labels[batch.sample].to(self.device)
            for size, found in right.items():
                found.append(self.network.read(resize(batch.image_signed(), size)) == truth)
        metrics = {}
        for size, found in right.items():
            by_attribute = torch.cat(found).float()
            metrics[f"accuracy_at_{size}"] = float(by_attribute.mean())
            metrics |= {
                f"{attribute.value}_at_{size}": float(value)
                for attribute, value in zip(CLASSES, by_attribute.mean(0), strict=True)
            }
        return metrics
