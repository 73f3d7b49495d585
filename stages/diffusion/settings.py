"""How a diffusion network is trained and sampled: schedule, objective, sampler, CLIP loss. Imports no torch."""

from enum import StrEnum
from typing import Annotated, Self, TypeVar

from pydantic import Field, model_validator

from pipeline.config import (
    ADDED_LATER,
    Fraction,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Settings,
    TrainingStageSettings,
    validate,
)
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


class Solver(StrEnum):
    """How the reverse process takes a step; the values are the usual short names.

    DDPM's ancestral steps are DDIM's with eta = 1, and Euler's steps of the probability flow are DDIM's with eta = 0.
    """

    DDIM = "ddim"
    DDPM = "ddpm"
    EULER = "euler"
    DPM_SOLVER_PP_2M = "dpmpp_2m"

    def eta(self, asked: float) -> float:
        """DDIM's eta with which its steps are taken; that of DPM-Solver++ is 0, for it adds no noise."""
        match self:
            case Solver.DDIM:
                return asked
            case Solver.DDPM:
                return 1.0
            case Solver.EULER | Solver.DPM_SOLVER_PP_2M:
                return 0.0


class SamplerSettings(Settings):
    """Defaults of the reverse process. `eta` is DDIM's: 1 is ancestral sampling, 0 is deterministic.

    `guidance_rescale` phi moves the deviation of a guided prediction towards that of the conditional one (arXiv
    2305.08891, section 3.4). Guidance acts at timesteps t with low <= t / T < high, the two in
    `guidance_interval` (arXiv 2404.07724).
    """

    steps: Positive
    eta: Fraction
    guidance_scale: NotNegativeFloat
    solver: Annotated[Solver, ADDED_LATER] = Solver.DDIM
    guidance_rescale: Annotated[Fraction, ADDED_LATER] = 0.0
    guidance_interval: Annotated[tuple[Fraction, Fraction], ADDED_LATER] = (0.0, 1.0)

    @model_validator(mode="after")
    def _interval_is_one(self) -> Self:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval=[{low:g},{high:g}] is empty; the first share must be the smaller one")
        return self


Sampler = TypeVar("Sampler", bound=SamplerSettings)


class SamplerOptions(Settings):
    """What may be asked for instead of a stage's own `SamplerSettings`; None keeps those."""

    steps: Positive | None = None
    eta: Fraction | None = None
    guidance_scale: NotNegativeFloat | None = None
    solver: Solver | None = None
    guidance_rescale: Fraction | None = None
    guidance_interval: tuple[Fraction, Fraction] | None = None

    def over(self, own: Sampler) -> Sampler:
        """The settings with what was asked for."""
        return validate(type(own), own.model_dump() | self.model_dump(exclude_none=True))


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
    """Raise `UserError` where the schedule has no valid betas, or objective, sampler or optimizer do not fit."""
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
    check_steps(f"{path}.sampler.steps", schedule, sampler.steps)
    decay = settings.optimizer.layer_decay
    if decay is not None:
        raise UserError(
            f"{path}.optimizer.layer_decay={decay:g} counts the layers of CLIP's towers; set "
            f"{path}.optimizer.learning_rate_factors"
        )


def check_steps(path: str, schedule: ScheduleSettings, steps: int) -> None:
    """Raise `UserError` if there are more sampling steps than timesteps."""
    if steps > schedule.timesteps:
        raise UserError(
            f"{path} {steps} is more than the schedule's {schedule.timesteps} timesteps; use at most "
            f"{schedule.timesteps}"
        )
