"""The stage `upsampler`: diffusion from a small picture to a larger one (unCLIP, section 2.1)."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import MadeAhead
from pipeline.data.draws import SampleDraws
from pipeline.data.loader import evaluation_loader
from pipeline.data.splits import Split
from pipeline.forecast.rehearsal import Rehearsal, Training
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.module import LOSS, SampleGrid, StageModule, within
from stages.blocks import BLOCKS
from stages.diffusion.process import NOISE, DiffusionProcess
from stages.generation.grid import captioned_grid
from stages.initial import load_initial
from stages.pictures import peak_signal_to_noise, resize
from stages.upsampler.degrade import degrade
from stages.upsampler.network import build_upsampler, denoise_upsampler, read_upsampler_folder
from stages.upsampler.sample import UpsamplerSampler
from stages.upsampler.settings import UpsamplerNumbers, UpsamplerSettings

GRID_PICTURES = 8
MEASURED_PICTURES = 32


def run(context: StageContext) -> StageResult:
    """Train on random crops of pictures and their degraded reductions; needs the pictures alone."""
    settings = context.settings_as(UpsamplerSettings)
    ahead = MadeAhead(normals={NOISE: (3, settings.crop_size, settings.crop_size)})
    images = context.images(settings.high_size, ahead=ahead)
    with context.building():
        upsampler = build_upsampler(settings.network, settings.high_size)
    load_initial(context, upsampler, partial(read_upsampler_folder, upsampler))
    shown = next(iter(evaluation_loader(images, split=Split.VALIDATION, batch_size=GRID_PICTURES, limit=GRID_PICTURES)))
    result = fit(context, UpsamplerModule(upsampler, settings, shown), images)
    context.save(upsampler)
    numbers = UpsamplerNumbers(low_size=settings.low_size, high_size=settings.high_size)
    return StageResult(numbers, result.metrics, result.samples_seen)


def rehearse(rehearsal: Rehearsal) -> Training:
    """The upsampler, for a forecast."""
    settings = rehearsal.settings_as(UpsamplerSettings)
    with rehearsal.building():
        upsampler = build_upsampler(settings.network, settings.high_size)
    shown = rehearsal.batch(GRID_PICTURES, settings.high_size)
    return Training(UpsamplerModule(upsampler, settings, shown), settings.high_size)


class UpsamplerModule(StageModule[UNet2DModel]):
    """Trains the upsampler."""

    block_classes = BLOCKS

    def __init__(self, upsampler: UNet2DModel, settings: UpsamplerSettings, shown: ImageBatch) -> None:
        super().__init__(upsampler, settings)
        self.settings = settings
        self.process = DiffusionProcess(settings.schedule, settings.objective)
        self._shown = shown

    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """The diffusion loss on one random crop of each picture."""
        settings, on_cpu = self.settings, SampleDraws(batch.sample_seed)  # where crops and degradations are chosen
        x_0 = random_crop(batch.image_signed(), settings.crop_size, settings.high_size // settings.low_size, on_cpu)
        low = resize(x_0, settings.crop_size * settings.low_size // settings.high_size)
        condition = resize(degrade(settings.degradation, low, on_cpu), settings.crop_size)
        noised = self.process.noise(x_0, batch.draws())
        prediction = denoise_upsampler(self.network, noised.x_t, noised.timestep, condition)
        loss = self.process.loss(prediction, noised)
        return {LOSS: loss.mean(), **self.process.loss_by_timestep(loss, noised)}

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """PSNR of sampled pictures against the truth, beside that of bicubic enlargement, and the loss."""
        kept = list(batches)
        return self._psnr(kept) | super().validation_metrics(kept)

    def _psnr(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        measured = within(batches, min(MEASURED_PICTURES, self.settings.global_batch_size))
        x_0 = torch.cat([batch.image_signed() for batch in measured])[:MEASURED_PICTURES]
        sample_seed = torch.cat([batch.sample_seed for batch in measured])[:MEASURED_PICTURES]
        low = resize(x_0, self.settings.low_size)
        drawn = self._sample(low, sample_seed)
        bicubic = resize(low, self.settings.high_size)
        return {"psnr_db": peak_signal_to_noise(drawn, x_0), "psnr_bicubic_db": peak_signal_to_noise(bicubic, x_0)}

    def _sample(self, low: Tensor, sample_seed: Tensor) -> Tensor:
        """Samples [B, 3, S, S], as many at a time as the device takes."""
        sampler = UpsamplerSampler(self.network, self.settings)
        pieces = zip(low.split(self.micro_batch_size), sample_seed.split(self.micro_batch_size), strict=True)
        return torch.cat([sampler.sample(piece, SampleDraws(seeds, self.device)) for piece, seeds in pieces])

    def sample_grid(self) -> SampleGrid:
        """Validation pictures: reduced and enlarged without smoothing, sampled from that, and the truth."""
        batch = self._shown.to(self.device)
        x_0 = batch.image_signed()
        low = resize(x_0, self.settings.low_size)
        pictures = {"reduced": low, "sample": self._sample(low, batch.sample_seed), "real": x_0}
        return captioned_grid(pictures, batch.caption, batch.sample_seed.tolist(), columns=2)


def random_crop(image: Tensor, size: int, step: int, draws: SampleDraws) -> Tensor:
    """A crop [B, C, size, size] of each picture [B, C, S, S], at a place that its sample draws, in multiples of `step`
    so that crop and reduction cover whole low-resolution pixels."""
    places = (image.shape[-1] - size) // step + 1
    tops = (draws.integer("crop top", places) * step).tolist()
    lefts = (draws.integer("crop left", places) * step).tolist()
    crops = [
        picture[:, top : top + size, left : left + size] for picture, top, left in zip(image, tops, lefts, strict=True)
    ]
    return torch.stack(crops)
