"""The forward process: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""

import torch
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from torch import Tensor, nn

from stages.diffusion.settings import LINEAR_BETA_END_TIMES_TIMESTEPS, ScheduleKind, ScheduleSettings


class NoiseSchedule(nn.Module):
    """The cumulative noise schedule of `settings.timesteps` steps; timestep 0 holds the least noise.

    Derived from the settings alone, so nothing of it is in a checkpoint. `betas` and `alpha_bar` are float64 [T] on the
    CPU; the square roots used in training are float32 buffers [T] (rounded from float64) that follow the module's
    device.
    """

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor

    def __init__(self, settings: ScheduleSettings) -> None:
        super().__init__()
        self.settings = settings
        self.betas = _betas(settings)
        self.alpha_bar = torch.cumprod(1.0 - self.betas, dim=0)
        self.register_buffer("sqrt_alpha_bar", self.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alpha_bar", (1.0 - self.alpha_bar).sqrt().float(), persistent=False)

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.settings.timesteps

    def coefficients(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for timestep int64 [B], shaped [B, 1, ...] to multiply `like`."""
        shape = (-1, *([1] * (like.ndim - 1)))
        signal = self.sqrt_alpha_bar[timestep].reshape(shape)
        noise = self.sqrt_one_minus_alpha_bar[timestep].reshape(shape)
        return signal, noise

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t for x_0 and noise float [B, ...] at timestep int64 [B] in [0, T) (DDPM, arXiv 2006.11239, eq. 4)."""
        signal, noise_level = self.coefficients(timestep, x_0)
        return signal * x_0 + noise_level * noise

    def signal_to_noise(self, timestep: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), float32 [B]; 0 at a zero-SNR timestep."""
        return (self.sqrt_alpha_bar[timestep] / self.sqrt_one_minus_alpha_bar[timestep]) ** 2


def _betas(settings: ScheduleSettings) -> Tensor:
    """beta_t, float64 [T]: the paper's cosine (arXiv 2102.09672, eq. 17) or DDPM's linear one (arXiv 2006.11239).

    The linear endpoints 1e-4 and 0.02 belong to T = 1000 and scale with 1000 / T. With `zero_terminal_snr` the
    schedule is rescaled so that alpha_bar ends at 0 (arXiv 2305.08891, algorithm 1).
    """
    steps = settings.timesteps
    match settings.kind:
        case ScheduleKind.COSINE:
            betas = betas_for_alpha_bar(steps).double()
        case ScheduleKind.LINEAR:
            betas = torch.linspace(0.1 / steps, LINEAR_BETA_END_TIMES_TIMESTEPS / steps, steps, dtype=torch.float64)
    return rescale_zero_terminal_snr(betas) if settings.zero_terminal_snr else betas
