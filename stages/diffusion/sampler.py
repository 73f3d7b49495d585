"""The reverse process: from noise to data by DDIM (arXiv 2010.02502) or DPM-Solver++ (2211.01095), and back by DDIM.

diffusers' `DDIMScheduler` takes the previous timestep to be t - T // steps, which misses its own next timestep wherever
the steps do not divide T; here each step ends where the next one starts. Where they divide it the two agree.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn

from pipeline.data.draws import SampleDraws
from stages.diffusion.process import DiffusionProcess, Noisy
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.settings import DiffusionStageSettings, SamplerSettings, Solver, check_steps

Network = TypeVar("Network", bound=nn.Module)
S = TypeVar("S", bound=DiffusionStageSettings)

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], timestep int64 [B]) -> the network's prediction [B, ...], classifier-free guidance included."""

StepNoise = Callable[[int], Tensor]
"""Index of a sampling step (0 is the noisiest) -> its noise, N(0, I), shaped as x_t, on x_t's device."""

Guidance = Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]
"""(predict_x_0, x_t, alpha_bar_t) -> guided x_0; see `stages.diffusion.guidance.ClipGuidance`."""

Constrain = Callable[[Tensor], Tensor]
"""x0_hat [B, ...] -> the same with what is known of x_0 put into it."""


def sampling_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 downwards, evenly spaced ("trailing" in arXiv 2305.08891, table 2)."""
    return [round(timesteps - index * timesteps / steps) - 1 for index in range(steps)]


class NetworkSampler(Generic[Network, S]):
    """Samples from a trained network, as the settings say that it was trained with."""

    def __init__(self, network: Network, settings: S) -> None:
        self.network = network
        self.settings = settings
        self.on_step: Callable[[], None] | None = None
        """Called after each evaluation of the network for a step, by whoever shows progress."""
        device = next(network.parameters()).device
        self._process = DiffusionProcess(settings.schedule, settings.objective).to(device)

    def draw(
        self,
        denoise: Denoise,
        draws: SampleDraws,
        purpose: str,
        shape: tuple[int, ...],
        sampler: SamplerSettings,
        *,
        clip_range: float = 1.0,
        guidance: Guidance | None = None,
        constrain: Constrain | None = None,
        x_T: Tensor | None = None,  # noqa: N803 (the paper's symbol)
        image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Samples float32 [B, *shape]. All noise is drawn by the samples' seeds, for a `purpose` of this network's.

        It begins with `x_T` [B, *shape] where that is given, and else with noise. Below a `strength` of 1 it begins
        with `image` [B, *shape] in as much noise as there is when that share of the steps is left.
        """
        check_steps(purpose, self.settings.schedule, sampler.steps)
        noise = draws.normal(purpose, shape) if x_T is None else x_T
        first = sampler.steps - max(1, round(strength * sampler.steps))
        if first > 0:
            assert image is not None, "there is nothing to begin with"
            timestep = sampling_timesteps(self.settings.schedule.timesteps, sampler.steps)[first]
            noise = self._process.schedule.add_noise(image, noise, torch.full((len(image),), timestep))
        return sample(
            denoise,
            noise,
            self._process,
            sampler.steps,
            first=first,
            solver=sampler.solver,
            clip_range=clip_range,
            eta=sampler.eta,
            step_noise=lambda index: draws.normal(f"{purpose} step {index}", shape),
            guidance=guidance,
            constrain=constrain,
            on_step=self.on_step,
        )

    def noise_of(self, denoise: Denoise, x_0: Tensor, sampler: SamplerSettings) -> Tensor:
        """x_T [B, ...] from which `draw`, with eta = 0, as many steps and this `denoise`, returns to x_0 [B, ...]."""
        return invert(denoise, x_0, self._process, sampler.steps, on_step=self.on_step)


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,  # noqa: N803 (the paper's symbol)
    process: DiffusionProcess,
    steps: int,
    *,
    first: int = 0,
    solver: Solver = Solver.DDIM,
    clip_range: float | None = 1.0,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
    guidance: Guidance | None = None,
    constrain: Constrain | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """x_0 [B, ...] from x_T ~ N(0, I) [B, ...] in `steps` evaluations of `denoise`.

    All randomness comes in as arguments, one slice per picture, so a picture does not depend on the batch it is in.
    `eta` of DDIM's steps of 0 is deterministic, 1 ancestral (and then needs `step_noise`). `clip_range` r clamps each
    x0_hat to [-r, r], after `guidance`; `constrain` has the last word on it. With a `first` step above 0, x_T is
    x_t at that step's timestep.
    """
    eta = solver.eta(eta)
    if eta > 0.0 and step_noise is None:
        raise ValueError("eta > 0 needs step_noise")
    schedule = process.schedule
    timesteps = sampling_timesteps(schedule.timesteps, steps)
    step: _Step = _DdimStep(process, timesteps, eta, step_noise)
    if solver is Solver.DPM_SOLVER_PP_2M:
        step = _DpmSolverStep(schedule, timesteps, first)
    x_t = x_T
    for index, current in enumerate(timesteps[first:], start=first):
        timestep = torch.full((len(x_t),), current, dtype=torch.int64, device=x_t.device)

        def predict_x_0(x: Tensor, timestep: Tensor = timestep) -> Tensor:
            return process.x_0(denoise(x, timestep), Noisy(x, timestep))

        alpha_bar = _alpha_bar(schedule, timesteps, index)
        x_0 = predict_x_0(x_t) if guidance is None else guidance(predict_x_0, x_t, alpha_bar)
        if clip_range is not None:
            x_0 = x_0.clamp(-clip_range, clip_range)
        if constrain is not None:
            x_0 = constrain(x_0)
        x_t = step(index, x_0, Noisy(x_t, timestep))
        if on_step is not None:
            on_step()
    return x_t


class _Step(Protocol):
    """From x_t of one step to that of the next, given x0_hat."""

    def __call__(self, index: int, x_0: Tensor, noisy: Noisy) -> Tensor: ...


class _DdimStep:
    """arXiv 2010.02502, eq. 12 and 16."""

    def __init__(
        self, process: DiffusionProcess, timesteps: Sequence[int], eta: float, step_noise: StepNoise | None
    ) -> None:
        self._process = process
        self._timesteps = timesteps
        self._eta = eta
        self._step_noise = step_noise

    def __call__(self, index: int, x_0: Tensor, noisy: Noisy) -> Tensor:
        schedule = self._process.schedule
        alpha_bar = _alpha_bar(schedule, self._timesteps, index)
        alpha_bar_next = _alpha_bar(schedule, self._timesteps, index + 1)
        # Derived from the clipped x_0, so that both stay consistent with x_t.
        noise = self._process.noise_between(x_0, noisy)
        variance = self._eta**2 * (1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next)
        x_t = alpha_bar_next**0.5 * x_0 + max(1.0 - alpha_bar_next - variance, 0.0) ** 0.5 * noise
        if self._step_noise is not None and variance > 0.0:
            x_t = x_t + variance**0.5 * self._step_noise(index)
        return x_t


class _DpmSolverStep:
    """diffusers' DPM-Solver++(2M), which is given x0_hat, whatever the network predicts."""

    def __init__(self, schedule: NoiseSchedule, timesteps: Sequence[int], first: int) -> None:
        self._scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=schedule.timesteps,
            trained_betas=schedule.betas.tolist(),
            prediction_type="sample",
            final_sigmas_type="zero",
            # Where alpha_bar ends at 0 its logarithm does not exist: diffusers puts 2^-24 in its place.
            rescale_betas_zero_snr=schedule.settings.zero_terminal_snr,
        )
        self._scheduler.set_timesteps(timesteps=list(timesteps))
        self._scheduler.set_begin_index(first)

    def __call__(self, index: int, x_0: Tensor, noisy: Noisy) -> Tensor:
        timestep = int(self._scheduler.timesteps[index])
        return self._scheduler.step(x_0, timestep, noisy.x_t, return_dict=False)[0]


@torch.no_grad()
def invert(
    denoise: Denoise,
    x_0: Tensor,
    process: DiffusionProcess,
    steps: int,
    *,
    refinements: int = 3,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """x_T [B, ...] from which `sample` with eta = 0 and as many steps returns about x_0 [B, ...].

    DDIM's ordinary differential equation run upwards (arXiv 2010.02502, section 4.3). The noise that leads to each
    level is at first the one predicted a level below. Each refinement takes what is predicted at the level that this
    led to, from which a step of `sample` goes back the same way (fixed-point iteration, as in arXiv 2309.04907).
    """
    upwards = sampling_timesteps(process.schedule.timesteps, steps)[::-1]
    x_t = x_0
    for below, above in zip([upwards[0], *upwards], upwards, strict=False):
        noisy = Noisy(x_t, torch.full((len(x_t),), below, dtype=torch.int64, device=x_t.device))
        is_clean = x_t is x_0
        x_0_hat = process.x_0(denoise(x_t, noisy.timestep), noisy)
        noise = process.noise_between(x_0_hat, noisy)
        timestep = torch.full_like(noisy.timestep, above)
        x_t = process.schedule.add_noise(x_0 if is_clean else x_0_hat, noise, timestep)
        for _ in range(0 if is_clean else refinements):
            x_0_hat = process.x_0(denoise(x_t, timestep), Noisy(x_t, timestep))
            noise = process.noise_between(x_0_hat, noisy)
            x_t = process.schedule.add_noise(x_0_hat, noise, timestep)
        if on_step is not None:
            on_step()
    return x_t


def _alpha_bar(schedule: NoiseSchedule, timesteps: Sequence[int], index: int) -> float:
    """alpha_bar at the `index`-th of the timesteps; clean data after the last."""
    return float(schedule.alpha_bar[timesteps[index]]) if index < len(timesteps) else 1.0
