"""How a diffusion network is trained and sampled: schedule, objective, sampler, CLIP loss. Imports no torch."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from pipeline.config import Fraction, NotNegativeFloat, Positive, PositiveFloat, Settings, TrainingStageSettings
from pipeline.errors import UserError

LINEAR_BETA_END_TIMES_TIMESTEPS = 20
"""The linear schedule ends at beta = 20 / timesteps (DDPM: 0.02 at 1000), which must stay below 1."""


class PredictionType(StrEnum):
    """What a diffusion network predicts; the values are diffusers' names."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V_PREDICTION = "v_prediction"


class ScheduleKind(StrEnum):
    """The shape of the cumulative noise schedule alpha_bar."""

    COSINE = "cosine"
    LINEAR = "linear"


class ScheduleSettings(Settings):
    """The forward process: how much noise each timestep holds."""

    kind: ScheduleKind
    timesteps: Positive
    zero_terminal_snr: bool


class ObjectiveSettings(Settings):
    """What the network is trained to predict, and how timesteps are weighted."""

    prediction_type: PredictionType
    min_snr_gamma: PositiveFloat | None


class SamplerSettings(Settings):
    """Defaults of the reverse process: DDIM with `eta` (1 is ancestral sampling, 0 is deterministic)."""

    steps: Positive
    eta: Fraction
    guidance_scale: NotNegativeFloat


class ClipLossSettings(Settings):
    """L_clip = E[-w(t) sim(x0_hat, caption)], weighted by lambda (`weight`). Zero loads no image tower.

    `timestep_power` p gives w(t) = alpha_bar_t^p: x0_hat means little at high noise. `sample_share` is the probability
    that a sample carries the loss (the rest are made up for, so that its mean stays).
    """

    weight: NotNegativeFloat
    timestep_power: NotNegativeFloat
    sample_share: Annotated[Fraction, Field(gt=0.0)]


class DiffusionStageSettings(TrainingStageSettings):
    """What every stage that trains a diffusion network has, beside its sampler."""

    schedule: ScheduleSettings
    objective: ObjectiveSettings


def check_diffusion(path: str, settings: DiffusionStageSettings, sampler: SamplerSettings) -> None:
    """Raise `UserError` if the schedule has no valid betas, or the objective or the sampler does not fit it."""
    schedule = settings.schedule
    if schedule.kind is ScheduleKind.LINEAR and schedule.timesteps <= LINEAR_BETA_END_TIMES_TIMESTEPS:
        raise UserError(
            f"{path}.schedule.timesteps {schedule.timesteps} is too few for a linear schedule, which needs more than "
            f"{LINEAR_BETA_END_TIMES_TIMESTEPS}; use 1000, or kind cosine"
        )
    if schedule.zero_terminal_snr and settings.objective.prediction_type is PredictionType.EPSILON:
        raise UserError(
            f"{path}.objective.prediction_type epsilon cannot be used with schedule.zero_terminal_snr true: the last "
            f"timestep is pure noise, from which epsilon gives no picture; use v_prediction or sample"
        )
    if sampler.steps > schedule.timesteps:
        raise UserError(
            f"{path}.sampler.steps {sampler.steps} is more than the schedule's {schedule.timesteps} "
            f"timesteps; use at most {schedule.timesteps}"
        )
