"""Small pictures to larger ones."""

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.diffusion.process import DiffusionProcess
from stages.diffusion.sampler import drawn_noise, sample
from stages.pictures import resize
from stages.upsampler.network import denoise_upsampler
from stages.upsampler.settings import UpsamplerSettings


class UpsamplerSampler:
    """Draws high-resolution pictures for low-resolution ones."""

    def __init__(self, upsampler: UNet2DModel, settings: UpsamplerSettings) -> None:
        self._upsampler = upsampler
        self.settings = settings
        self._process = DiffusionProcess(settings.schedule, settings.objective).to(next(upsampler.parameters()).device)

    def sample(self, low: Tensor, draws: SampleDraws, steps: int | None = None) -> Tensor:
        """Pictures float32 [B, 3, high_size, high_size] in [-1, 1] for [B, 3, low_size, low_size] in [-1, 1]."""
        size = self.settings.high_size
        condition = resize(low, size)
        x_T, step_noise = drawn_noise(draws, f"upsampler {size}", (3, size, size))  # noqa: N806 (the paper's symbol)
        return sample(
            lambda x_t, timestep: denoise_upsampler(self._upsampler, x_t, timestep, condition),
            x_T,
            self._process,
            steps or self.settings.sampler.steps,
            eta=self.settings.sampler.eta,
            step_noise=step_noise,
        )
