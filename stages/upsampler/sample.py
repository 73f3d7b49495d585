"""Small pictures to larger ones."""

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.diffusion.sampler import ReverseProcess, sample
from stages.diffusion.schedule import NoiseSchedule
from stages.settings import UpsamplerSettings
from stages.upsampler.network import denoise_upsampler, upsample_condition


class UpsamplerSampler:
    """Draws high-resolution pictures for low-resolution ones."""

    def __init__(self, upsampler: UNet2DModel, settings: UpsamplerSettings) -> None:
        self._upsampler = upsampler
        self.settings = settings
        schedule = NoiseSchedule(settings.schedule).to(next(upsampler.parameters()).device)
        self._process = ReverseProcess(schedule, settings.objective.prediction_type, clip_range=1.0)

    def sample(self, low: Tensor, draws: SampleDraws, steps: int | None = None) -> Tensor:
        """Pictures float32 [B, 3, high_size, high_size] in [-1, 1] for [B, 3, low_size, low_size] in [-1, 1]."""
        size = self.settings.high_size
        condition = upsample_condition(low, size)
        shape = (3, size, size)
        purpose = f"upsampler {size}"
        return sample(
            lambda x_t, timestep: denoise_upsampler(self._upsampler, x_t, timestep, condition),
            draws.normal(purpose, shape),
            self._process,
            steps=steps or self.settings.sampler.steps,
            eta=self.settings.sampler.eta,
            step_noise=lambda index: draws.normal(f"{purpose} step {index}", shape),
        )
