"""What a diffusion network predicts, how predictions convert into each other, and how timesteps are weighted."""

import torch
from torch import Tensor

from stages.diffusion.schedule import NoiseSchedule
from stages.settings import ObjectiveSettings, PredictionType

_MIN_SIGNAL = 1e-6
"""Floor of sqrt(alpha_bar_t) where epsilon is turned into x_0: a cosine schedule of 1000 steps ends at 5e-5."""


def target(
    prediction_type: PredictionType, schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """What the network should have predicted, float [B, ...].

    v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512, section 4).
    """
    match prediction_type:
        case PredictionType.EPSILON:
            return noise
        case PredictionType.SAMPLE:
            return x_0
        case PredictionType.V_PREDICTION:
            signal, noise_level = schedule.coefficients(timestep, x_0)
            return signal * noise - noise_level * x_0


def predicted_x_0(
    prediction_type: PredictionType, schedule: NoiseSchedule, prediction: Tensor, x_t: Tensor, timestep: Tensor
) -> Tensor:
    """The clean data that `prediction` implies at x_t, float [B, ...], unclipped. Differentiable in both.

    From epsilon it is singular where alpha_bar_t = 0; such schedules are refused by `stages.unet.check_diffusion`,
    and the denominator is kept above 1e-6.
    """
    match prediction_type:
        case PredictionType.EPSILON:
            signal, noise_level = schedule.coefficients(timestep, x_t)
            return (x_t - noise_level * prediction) / signal.clamp(min=_MIN_SIGNAL)
        case PredictionType.SAMPLE:
            return prediction
        case PredictionType.V_PREDICTION:
            signal, noise_level = schedule.coefficients(timestep, x_t)
            return signal * x_t - noise_level * prediction


def predicted_noise(
    prediction_type: PredictionType, schedule: NoiseSchedule, prediction: Tensor, x_t: Tensor, timestep: Tensor
) -> Tensor:
    """The noise that `prediction` implies at x_t, float [B, ...]."""
    match prediction_type:
        case PredictionType.EPSILON:
            return prediction
        case PredictionType.SAMPLE:
            return noise_from_x_0(schedule, prediction, x_t, timestep)
        case PredictionType.V_PREDICTION:
            signal, noise_level = schedule.coefficients(timestep, x_t)
            return signal * prediction + noise_level * x_t


def noise_from_x_0(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
    """noise = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t), float [B, ...]."""
    signal, noise_level = schedule.coefficients(timestep, x_t)
    return (x_t - signal * x_0) / noise_level


def timestep_weight(settings: ObjectiveSettings, schedule: NoiseSchedule, timestep: Tensor) -> Tensor:
    """The loss weight of each sample, float32 [B]: 1, or min-SNR-gamma (arXiv 2303.09556, eq. 6 and section 3.4).

    In terms of x_0 the weight is min(SNR, gamma); an error in the noise is SNR times, and one in v (SNR + 1) times,
    that in x_0, so their weights are divided by as much. At SNR = 0 epsilon keeps its limit of 1.
    """
    gamma = settings.min_snr_gamma
    snr = schedule.signal_to_noise(timestep)
    if gamma is None:
        return torch.ones_like(snr)
    match settings.prediction_type:
        case PredictionType.EPSILON:
            return (gamma / snr).clamp(max=1.0)
        case PredictionType.SAMPLE:
            return snr.clamp(max=gamma)
        case PredictionType.V_PREDICTION:
            return snr.clamp(max=gamma) / (snr + 1.0)


def diffusion_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error of each sample, float32 [B]: the mean over everything but the batch, times weight [B]."""
    return weight * (prediction.float() - target.float()).square().flatten(1).mean(1)
