"""The diffusion process of a network: how its data is noised, what it predicts, and how that is held to the truth."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.data.draws import SampleDraws
from pipeline.training.weighted import weighted
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.settings import ObjectiveSettings, PredictionType, ScheduleSettings

TIMESTEP_BINS = 4
NOISE = "noise"
"""The purpose of the normal draw that data is noised with; its shape is that of the data."""

_MIN_SIGNAL = 1e-6
"""Floor of sqrt(alpha_bar_t) where epsilon is turned into x_0: a cosine schedule of 1000 steps ends at 5e-5."""


@dataclass(frozen=True, eq=False)
class Noisy:
    """Noisy data x_t float [B, ...] at timestep int64 [B]."""

    x_t: Tensor
    timestep: Tensor


@dataclass(frozen=True, eq=False)
class Noised(Noisy):
    """Data that was noised: x_t, and the clean data x_0 and the noise that it is made of, float [B, ...] each."""

    x_0: Tensor
    noise: Tensor


class DiffusionProcess(nn.Module):
    """A noise schedule, and what a network on it predicts. It has no state that a checkpoint would hold."""

    def __init__(self, schedule: ScheduleSettings, objective: ObjectiveSettings) -> None:
        super().__init__()
        self.schedule = NoiseSchedule(schedule)
        self.objective = objective

    def noise(self, x_0: Tensor, draws: SampleDraws) -> Noised:
        """Noise data float [B, ...] to timesteps that its samples draw."""
        timestep = draws.integer("timestep", self.schedule.timesteps)
        noise = draws.normal(NOISE, tuple(x_0.shape[1:]))
        return Noised(self.schedule.add_noise(x_0, noise, timestep), timestep, x_0, noise)

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The weighted squared error of each sample, float32 [B]: the mean over everything but the batch."""
        error = prediction.float() - self.target(noised).float()
        return self.weight(noised.timestep) * error.square().flatten(1).mean(1)

    def loss_by_timestep(self, loss: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Each sample's loss float [B] as means over quarters of the timesteps, `diffusion_t0` (the least noisy) to
        `diffusion_t3`, with the weights that `weighted_means` takes; without gradient."""
        edges = torch.arange(TIMESTEP_BINS, device=loss.device)
        is_in = noised.timestep[:, None] * TIMESTEP_BINS // self.schedule.timesteps == edges
        sums, weights = torch.where(is_in, loss.detach()[:, None], 0.0).mean(0), is_in.float().mean(0)
        means = zip(sums.unbind(), weights.unbind(), strict=True)
        return {
            name: value
            for number, (total, weight) in enumerate(means)
            for name, value in weighted(f"diffusion_t{number}", total, weight).items()
        }

    def target(self, noised: Noised) -> Tensor:
        """What the network should have predicted, float [B, ...].

        v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512, section 4).
        """
        match self.objective.prediction_type:
            case PredictionType.EPSILON:
                return noised.noise
            case PredictionType.SAMPLE:
                return noised.x_0
            case PredictionType.V_PREDICTION:
                signal, noise_level = self.schedule.coefficients(noised.timestep, noised.x_0)
                return signal * noised.noise - noise_level * noised.x_0

    def x_0(self, prediction: Tensor, noisy: Noisy) -> Tensor:
        """The clean data that `prediction` implies, float [B, ...], unclipped. Differentiable in it and in x_t.

        From epsilon it is singular where alpha_bar_t = 0; `stages.diffusion.settings.check_diffusion` refuses such
        schedules, and the denominator is kept above 1e-6.
        """
        signal, noise_level = self.schedule.coefficients(noisy.timestep, noisy.x_t)
        match self.objective.prediction_type:
            case PredictionType.EPSILON:
                return (noisy.x_t - noise_level * prediction) / signal.clamp(min=_MIN_SIGNAL)
            case PredictionType.SAMPLE:
                return prediction
            case PredictionType.V_PREDICTION:
                return signal * noisy.x_t - noise_level * prediction

    def noise_between(self, x_0: Tensor, noisy: Noisy) -> Tensor:
        """noise = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t), float [B, ...]."""
        signal, noise_level = self.schedule.coefficients(noisy.timestep, noisy.x_t)
        return (noisy.x_t - signal * x_0) / noise_level

    def weight(self, timestep: Tensor) -> Tensor:
        """The loss weight of each sample, float32 [B]: 1, or min-SNR-gamma (arXiv 2303.09556, eq. 6 and section 3.4).

        In terms of x_0 the weight is min(SNR, gamma); an error in the noise is SNR times, and one in v (SNR + 1) times,
        that in x_0, so their weights are divided by as much. At SNR = 0 epsilon keeps its limit of 1.
        """
        gamma = self.objective.min_snr_gamma
        snr = self.schedule.signal_to_noise(timestep)
        if gamma is None:
            return torch.ones_like(snr)
        match self.objective.prediction_type:
            case PredictionType.EPSILON:
                return (gamma / snr).clamp(max=1.0)
            case PredictionType.SAMPLE:
                return snr.clamp(max=gamma)
            case PredictionType.V_PREDICTION:
                return snr.clamp(max=gamma) / (snr + 1.0)
