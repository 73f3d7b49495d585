"""The reverse process: DDIM (arXiv 2010.02502), from noise to data and back.

diffusers' `DDIMScheduler` takes the previous timestep to be t - T // steps, which misses its own next timestep wherever
the steps do not divide T; here each step ends where the next one starts. Where they divide it the two agree.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline.data.draws import SampleDraws
from stages.diffusion.process import DiffusionProcess, Noisy
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.settings import DiffusionStageSettings

Network = TypeVar("Network", bound=nn.Module)
S = TypeVar("S", bound=DiffusionStageSettings)

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], timestep int64 [B]) -> the network's prediction [B, ...], classifier-free guidance included."""

StepNoise = Callable[[int], Tensor]
"""Index of a sampling step (0 is the noisiest) -> its noise, N(0, I), shaped as x_t, on x_t's device."""

Guidance = Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]
"""(predict_x_0, x_t, alpha_bar_t) -> guided x_0; see `stages.diffusion.guidance.ClipGuidance`."""


def sampling_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 downwards, evenly spaced ("trailing" in arXiv 2305.08891, table 2)."""
    return [round(timesteps - index * timesteps / steps) - 1 for index in range(steps)]


class NetworkSampler(Generic[Network, S]):
    """Samples from a trained network, as the settings say that it was trained with."""

    def __init__(self, network: Network, settings: S) -> None:
        self.network = network
        self.settings = settings
        device = next(network.parameters()).device
        self._process = DiffusionProcess(settings.schedule, settings.objective).to(device)

    def draw(
        self,
        denoise: Denoise,
        draws: SampleDraws,
        purpose: str,
        shape: tuple[int, ...],
        *,
        steps: int,
        eta: float,
        clip_range: float = 1.0,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Samples float32 [B, *shape]. All noise is drawn by the samples' seeds, for a `purpose` of this network's."""
        return sample(
            denoise,
            draws.normal(purpose, shape),
            self._process,
            steps,
            clip_range=clip_range,
            eta=eta,
            step_noise=lambda index: draws.normal(f"{purpose} step {index}", shape),
            guidance=guidance,
        )


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,  # noqa: N803 (the paper's symbol)
    process: DiffusionProcess,
    steps: int,
    *,
    clip_range: float | None = 1.0,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
    guidance: Guidance | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """x_0 [B, ...] from x_T ~ N(0, I) [B, ...] in `steps` evaluations of `denoise` (arXiv 2010.02502, eq. 12 and 16).

    All randomness comes in as arguments, one slice per picture, so a picture does not depend on the batch it is in.
    `eta` of 0 is deterministic, 1 ancestral (and then needs `step_noise`). `clip_range` r clamps each x0_hat to
    [-r, r]. `on_step(index, x_0_hat)` sees each prediction.
    """
    if eta > 0.0 and step_noise is None:
        raise ValueError("eta > 0 needs step_noise")
    schedule = process.schedule
    timesteps = sampling_timesteps(schedule.timesteps, steps)
    x_t = x_T
    for index, current in enumerate(timesteps):
        alpha_bar, alpha_bar_next = _alpha_bar(schedule, timesteps, index), _alpha_bar(schedule, timesteps, index + 1)
        timestep = torch.full((len(x_t),), current, dtype=torch.int64, device=x_t.device)

        def predict_x_0(x: Tensor, timestep: Tensor = timestep) -> Tensor:
            return process.x_0(denoise(x, timestep), Noisy(x, timestep))

        x_0 = predict_x_0(x_t) if guidance is None else guidance(predict_x_0, x_t, alpha_bar)
        if clip_range is not None:
            x_0 = x_0.clamp(-clip_range, clip_range)
        # Derived from the clipped x_0, so that both stay consistent with x_t.
        noise = process.noise_between(x_0, Noisy(x_t, timestep))
        variance = eta**2 * (1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next)
        x_t = alpha_bar_next**0.5 * x_0 + max(1.0 - alpha_bar_next - variance, 0.0) ** 0.5 * noise
        if step_noise is not None and variance > 0.0:
            x_t = x_t + variance**0.5 * step_noise(index)
        if on_step is not None:
            on_step(index, x_0)
    return x_t


@torch.no_grad()
def invert(denoise: Denoise, x_0: Tensor, process: DiffusionProcess, steps: int) -> Tensor:
    """x_T [B, ...] from which `sample` with eta = 0 and as many steps returns about x_0 [B, ...].

    DDIM's ordinary differential equation run upwards (arXiv 2010.02502, section 4.3), first order in 1 / steps: the
    noise that leads to each level is the one predicted a level below.
    """
    upwards = sampling_timesteps(process.schedule.timesteps, steps)[::-1]
    x_t = x_0
    for below, above in zip([upwards[0], *upwards], upwards, strict=False):
        noisy = Noisy(x_t, torch.full((len(x_t),), below, dtype=torch.int64, device=x_t.device))
        x_0_hat = process.x_0(denoise(x_t, noisy.timestep), noisy)
        noise = process.noise_between(x_0_hat, noisy)
        x_0_hat = x_0 if x_t is x_0 else x_0_hat
        x_t = process.schedule.add_noise(x_0_hat, noise, torch.full_like(noisy.timestep, above))
    return x_t


def _alpha_bar(schedule: NoiseSchedule, timesteps: Sequence[int], index: int) -> float:
    """alpha_bar at the `index`-th of the timesteps; clean data after the last."""
    return float(schedule.alpha_bar[timesteps[index]]) if index < len(timesteps) else 1.0
