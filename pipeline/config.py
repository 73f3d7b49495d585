"""Typed settings: what a composed config is validated against before anything runs."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A frozen, typed piece of the config. Unknown keys are refused; defaults are written in `conf/`, not here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class RuntimeMarker:
    """Marks a setting that changes how a stage runs and not what it makes: it stays out of the fingerprint."""


RUNTIME = RuntimeMarker()

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegativeFloat = Annotated[float, Field(ge=0.0)]


class DecayKind(StrEnum):
    """How the learning rate falls after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


class OptimizerSettings(Settings):
    """AdamW with warm-up and decay on the `samples_seen` axis, and an exponential moving average of the weights.

    `ema_decay` is per optimiser step; 0 keeps the weights themselves.
    """

    learning_rate: PositiveFloat
    warmup_samples: NotNegative
    decay: DecayKind
    final_learning_rate_share: Fraction
    beta1: Fraction
    beta2: Fraction
    epsilon: PositiveFloat
    weight_decay: NotNegativeFloat
    gradient_clip_norm: PositiveFloat | None
    ema_decay: Fraction


class TrainingStageSettings(Settings):
    """What every stage that trains a network has."""

    global_batch_size: Positive
    max_samples: NotNegative
    optimizer: OptimizerSettings

    @property
    def max_steps(self) -> int:
        """Optimiser steps until `max_samples` are seen (rounded up to whole batches)."""
        return -(-self.max_samples // self.global_batch_size)


class Precision(StrEnum):
    """Lightning's names. Precision changes the result, so it is part of every fingerprint."""

    FLOAT32 = "32-true"
    BFLOAT16_MIXED = "bf16-mixed"
    FLOAT16_MIXED = "16-mixed"


class TrainerSettings(Settings):
    """How a stage runs on its devices. Only `precision` changes what it makes.

    `micro_batch_size` is the most samples that one device takes at once; null means its whole share of the batch.
    """

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Positive
    precision: Precision
    micro_batch_size: Positive | None
    loader_workers: NotNegative
    cpu_threads: Positive | None
    cache_mib: NotNegative
    log_every_steps: Positive
    validate_every_samples: Positive | None
    sample_every_samples: Positive | None
    checkpoint_every_samples: Positive | None
    checkpoint_every_min: PositiveFloat
    keep_checkpoints: Positive


class TrackingMode(StrEnum):
    """Where Weights & Biases keeps its runs."""

    ONLINE = "online"
    OFFLINE = "offline"
    NONE = "none"


class TrackingSettings(Settings):
    """Weights & Biases; `offline` needs no account and no network."""

    mode: TrackingMode
    project: str
    entity: str | None
