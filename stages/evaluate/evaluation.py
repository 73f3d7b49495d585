"""The measurements of one run. They are taken by one process, so that each sample counts once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from pipeline.data.batch import ImageBatch, signed
from pipeline.data.dataset import CaptionedImages
from pipeline.data.decode import DecodeError
from pipeline.data.loader import rows_loader
from pipeline.data.splits import Split
from pipeline.data.square import central_square
from pipeline.errors import UserError
from pipeline.training.module import SampleGrid
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, zero_shot_classifier
from stages.clip.retrieval import retrieval_hits
from stages.clip.zero_shot import class_names, right_within
from stages.evaluate.attributes import AttributeAccuracy, judged_rows
from stages.evaluate.encoders import Collected, Encoder, load_encoder, of_clip
from stages.evaluate.estimate import Estimate, mean, mean_of_shares, proportion
from stages.evaluate.metric import CLIP, JUDGE_CLIP, Embeds, Made
from stages.evaluate.settings import EvaluateSettings, classes_in, metric_of, pictures_in
from stages.generation.grid import captioned_grid, to_pil
from stages.generation.options import OWN_SAMPLERS, GenerationOptions
from stages.generation.text_to_image import Generated, TextToImage
from stages.judge.labels import true_labels
from stages.judge.network import Judge
from stages.pictures import peak_signal_to_noise_of_each, resize

GRID_COLUMNS = 4
SMALLEST_FOR_SSIM = 11
"""The window of SSIM has so many pixels."""

OnStep = Callable[[int, int, str], None]
"""(pictures made, pictures to make, what is done) is told after each batch."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and with which networks of its own run. A run that makes no pictures has no `chain`."""

    clip: ClipModel
    chain: TextToImage | None
    judge: Judge | None = None
    judge_clip: ClipModel | None = None


@dataclass(frozen=True, eq=False)
class Sampled:
    """The metrics of made pictures, and the pictures themselves: real, base and final, N each."""

    metrics: dict[str, float]
    pictures: dict[str, list[Image.Image]]
    captions: list[str]
    seeds: list[int]


class Evaluation:
    """`made` counts the pictures that were made. A sample that cannot be used is left out, not replaced.

    Encoders are loaded at once: what is missing is said before anything is sampled.
    """

    def __init__(
        self, subject: Subject, images: CaptionedImages, settings: EvaluateSettings, workers: int, on_step: OnStep
    ) -> None:
        self.made = 0
        self._subject = subject
        self._images = images
        self._settings = settings
        self._workers = workers
        self._on_step = on_step
        self._device = subject.clip.pixel_mean.device
        clips = {CLIP: subject.clip, JUDGE_CLIP: subject.judge_clip}
        self._encoders: dict[str, Encoder] = {name: of_clip(clip) for name, clip in clips.items() if clip is not None}
        for name in settings.encoders_of_files:
            self._encoders[name] = load_encoder(name, settings.encoders, self._device)
        self._judged_rows = judged_rows(images, settings.judged_samples) if subject.judge is not None else {}
        self._sampled_rows = self._validation_rows(settings.samples)
        self._to_make = len(self._sampled_rows) + sum(map(len, self._judged_rows.values()))

    def attributes(self, options: GenerationOptions = OWN_SAMPLERS) -> AttributeAccuracy:
        """What the judge reads off pictures of fully described single objects, at both sizes; none without one."""
        accuracy, judge = AttributeAccuracy(), self._subject.judge
        for group, rows in self._judged_rows.items():
            for batch, generated in self._generated(options, rows, f"{group} pairs for the judge"):
                assert judge is not None, "rows are judged where there is a judge"
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
        return accuracy

    def samples(self, options: GenerationOptions = OWN_SAMPLERS) -> Sampled:
        """The metrics of pictures made from validation captions, beside the real ones."""
        metrics = [metric_of(name) for name in self._settings.metrics]
        collected = {name: Collected(encoder) for name, encoder in self._encoders.items()}
        found = Sampled({}, {"real": [], "base": [], "final": []}, [], [])
        sampled: list[Tensor] = []
        for batch, generated in self._generated(options, self._sampled_rows, "validation captions"):
            made = Made(batch.caption, batch.image_signed(), generated.base, generated.final)
            for each in (*collected.values(), *metrics):
                each.add(made)
            sampled.append(generated.image_embed.float())
            for name, pictures in found.pictures.items():
                pictures += map(to_pil, getattr(made, name))
            found.captions.extend(batch.caption)
            found.seeds.extend(batch.sample_seed.tolist())
        embeds = Embeds(
            {name: each.all() for name, each in collected.items()},
            torch.cat(sampled) if self._chain.prior else None,
            self._settings.retrieval_pool,
        )
        for metric in metrics:
            found.metrics.update(metric.results(embeds))
        return found

    def retrieval(self) -> dict[str, float]:
        """How well CLIP finds real pictures by their captions and captions by their pictures, on validation pairs."""
        rows = self._validation_rows(self._settings.retrieval_samples)
        clip, captions = self._subject.clip, CaptionEncoder(self._subject.clip)
        image_embeds, text_embeds = [], []
        for batch in self._batches(rows):
            image_embeds.append(clip.encode_image(batch.image_signed()).float())
            text_embeds.append(captions.encode(batch.caption).embed.float())
            self._on_step(self.made, self._to_make, "retrieval")
        hits = retrieval_hits(
            F.normalize(torch.cat(image_embeds), dim=-1),
            F.normalize(torch.cat(text_embeds), dim=-1),
            self._settings.retrieval_pool,
        )
        return named({f"clip/{name}": mean_of_shares(found) for name, found in hits.items()})

    def upsampling(self, options: GenerationOptions = OWN_SAMPLERS) -> dict[str, float]:
        """PSNR and SSIM of real pictures, reduced and enlarged again: by the upsamplers, and by plain bicubic
        interpolation; none without upsamplers."""
        chain = self._subject.chain
        if chain is None or not chain.upsamplers:
            return {}
        found: dict[str, list[Tensor]] = {}
        for batch in self._batches(self._sampled_rows):
            real = batch.image_signed()
            low = resize(real, chain.upsamplers[0].settings.low_size)
            enlarged = low
            for place, upsampler in enumerate(chain.upsamplers):
                enlarged = upsampler.sample(enlarged, batch.draws(), options.of_upsampler(place))
            for name, picture in {"": enlarged, "_bicubic": resize(low, real.shape[-1])}.items():
                found.setdefault(f"psnr{name}_db", []).append(peak_signal_to_noise_of_each(picture, real))
                if real.shape[-1] >= SMALLEST_FOR_SSIM:
                    found.setdefault(f"ssim{name}", []).append(ssim_of_each(picture, real))
            self._on_step(self.made, self._to_make, "upsampling")
        return named({f"upsampler/{name}": mean(torch.cat(values)) for name, values in found.items()})

    @torch.no_grad()
    def zero_shot(self) -> dict[str, float]:
        """CLIP's accuracy on a folder of classes, told in sentences that it was not trained for; none without one.

        Raises:
            UserError: a picture cannot be decoded.
        """
        if self._settings.classes is None:
            return {}
        clip = self._subject.clip
        directories = classes_in(self._settings.classes, "classes")
        classes = zero_shot_classifier(clip, class_names(directories))
        files = [(file, number) for number, each in enumerate(directories) for file in pictures_in(each)]
        right: dict[int, list[Tensor]] = {1: [], 5: []}
        for first in range(0, len(files), self._settings.batch_size):
            some = files[first : first + self._settings.batch_size]
            pictures = np.stack([_square_of(file, clip.settings.image_size) for file, _ in some])
            image = signed(torch.from_numpy(pictures).to(self._device))
            truth = torch.tensor([number for _, number in some], device=self._device)
            for at, found in right.items():
                found.append(right_within(clip, image, classes, truth, at))
            self._on_step(self.made, self._to_make, f"zero-shot classes, {first + len(some)} of {len(files)} pictures")
        kept = {at: torch.cat(found) for at, found in right.items() if at < len(directories)}
        return named({f"zero_shot/top{at}": proportion(found) for at, found in kept.items()})

    @property
    def _chain(self) -> TextToImage:
        assert self._subject.chain is not None, "this run makes no pictures"
        return self._subject.chain

    def _validation_rows(self, count: int) -> NDArray[np.int64]:
        return spread(self._images.data.samples_in(Split.VALIDATION), count)

    def _generated(
        self, options: GenerationOptions, rows: NDArray[np.int64], activity: str
    ) -> Iterator[tuple[ImageBatch, Generated]]:
        for batch in self._batches(rows):
            generated = self._chain.generate(batch.caption, batch.sample_seed.tolist(), options)
            self.made += len(batch)
            self._on_step(self.made, self._to_make, activity)
            yield batch, generated

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[ImageBatch]:
        size = self._settings.batch_size
        loader = rows_loader(
            self._images, [rows], batch_size=size, workers=self._workers, pin_memory=self._device.type == "cuda"
        )
        for number, batch in enumerate(loader):
            kept = _without_replacements(batch, rows[number * size : (number + 1) * size])
            if len(kept):
                yield kept.to(self._device, non_blocking=True)


def measured_size(chain: TextToImage) -> int:
    """The width in pixels of the real pictures that a chain's are measured against: as its own, or where no upsampler
    makes those large, as CLIP takes them."""
    return chain.final_size if chain.upsamplers else chain.clip.settings.image_size


def grid_of(sampled: Sampled, captions: int) -> SampleGrid:
    """Some of the pictures, evenly over them, with their captions."""
    shown = spread(np.arange(len(sampled.captions)), captions).tolist()
    pictures = {name: [found[place] for place in shown] for name, found in sampled.pictures.items()}
    shown_captions, seeds = [sampled.captions[place] for place in shown], [sampled.seeds[place] for place in shown]
    return captioned_grid(pictures, shown_captions, seeds, columns=GRID_COLUMNS)


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the rows, evenly over them: neighbours in an index are often alike."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def named(estimates: dict[str, Estimate]) -> dict[str, float]:
    """Estimates as metrics are reported, each with the ends of its interval."""
    return {key: value for name, estimate in estimates.items() for key, value in estimate.named(name).items()}


def _without_replacements(batch: ImageBatch, asked: NDArray[np.int64]) -> ImageBatch:
    """The samples that were asked for: one shown in the place of another would count twice."""
    places = [place for place, row in enumerate(batch.sample.tolist()) if row == asked[place]]
    if len(places) == len(batch):
        return batch
    captions = tuple(batch.caption[place] for place in places)
    return ImageBatch(batch.image[places], captions, batch.sample[places], batch.sample_seed[places])


def ssim_of_each(image: Tensor, truth: Tensor) -> Tensor:
    """SSIM of each of the pictures float [B, 3, H, W] in [-1, 1] against its truth, float32 [B]."""
    found = structural_similarity_index_measure(
        image.float().clamp(-1, 1), truth.float(), data_range=2.0, reduction="none"
    )
    assert isinstance(found, Tensor), "torchmetrics gives more only where more is asked for"
    return found.reshape(-1)


def _square_of(file: Path, size: int) -> NDArray[np.uint8]:
    try:
        return central_square(file.read_bytes(), size)
    except (DecodeError, OSError) as error:
        raise UserError(f"{file} cannot be decoded ({error}); mend it or take it away") from error
