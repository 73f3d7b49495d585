"""Typed settings: what a composed config is validated against before anything runs."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.config_fault import first_fault
from pipeline.errors import UserError


class Settings(BaseModel):
    """A frozen, typed piece of the config. Unknown keys are refused; defaults are written in `conf/`, not here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class RuntimeMarker:
    """Marks a setting that changes how a stage runs and not what it makes: it stays out of the fingerprint."""


class AddedLaterMarker:
    """Marks a setting that came after results were made: its default is what these were made with.

    Where it has its default it stays out of the fingerprint, so that they remain valid.
    """


RUNTIME = RuntimeMarker()
ADDED_LATER = AddedLaterMarker()

INTEGER_LIMIT = 2**63
"""Counts and sizes are below this: they become int64 somewhere."""

SEED_LIMIT = 2**64
"""Seeds are below this: what is drawn depends on 64 bits, so that a greater one would repeat another one's draws."""

HERE = "here"
"""The machine on which a forecast is asked for."""

# Strict: `true` is not 1, "1" is not 1, and nothing is rounded. A whole number does for a float.
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True, allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0, lt=INTEGER_LIMIT, strict=True)]
NotNegative = Annotated[int, Field(ge=0, lt=INTEGER_LIMIT, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0.0, strict=True, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0.0, strict=True, allow_inf_nan=False)]
LayerDecay = Annotated[float, Field(gt=0.0, le=1.0, strict=True, allow_inf_nan=False)]


class DecayKind(StrEnum):
    """How the learning rate falls after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


class NonFinite(StrEnum):
    """What a stage does about a step whose loss or gradient is not finite."""

    STOP = "stop"
    SKIP = "skip"


class OptimizerSettings(Settings):
    """AdamW with warm-up and decay on the `samples_seen` axis, and an exponential moving average of the weights.

    `ema_decay` is per optimiser step; 0 keeps the weights themselves.
    `freeze` and `learning_rate_factors` name parameters, as the weights' file does, by shell patterns: those that keep
    their values, and what the learning rate of others is multiplied by (where several patterns fit, by each).
    `layer_decay` multiplies that of each layer of CLIP's towers once for every layer above it.
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
    non_finite: NonFinite
    ema_decay: Fraction
    freeze: Annotated[tuple[str, ...], ADDED_LATER] = ()
    learning_rate_factors: Annotated[dict[str, PositiveFloat] | None, ADDED_LATER] = None
    layer_decay: Annotated[LayerDecay | None, ADDED_LATER] = None


class TrainingStageSettings(Settings):
    """What every stage that trains a network has. `initial` names the weights that it starts from: run:NAME."""

    initial: Annotated[str | None, ADDED_LATER] = None
    global_batch_size: Positive
    max_samples: NotNegative
    optimizer: OptimizerSettings

    @property
    def max_steps(self) -> int:
        """Optimiser steps until `max_samples` are seen (rounded up to whole batches)."""
        return -(-self.max_samples // self.global_batch_size)


class Precision(StrEnum):
    """Lightning's names, but for `bf16-products`. Precision changes the result, so it is part of every fingerprint.

    `bf16-products` trains in float32, and has linear and convolutional layers multiply in bf16 where there are
    instructions for it.
    """

    FLOAT32 = "32-true"
    BFLOAT16_PRODUCTS = "bf16-products"
    BFLOAT16_MIXED = "bf16-mixed"
    FLOAT16_MIXED = "16-mixed"

    @property
    def of_lightning(self) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
        """What Lightning is told, for what is computed around the products."""
        return "32-true" if self is Precision.BFLOAT16_PRODUCTS else self.value


class StrategyName(StrEnum):
    """How the state of a network is spread over devices: whole on each (`ddp`), or in shards (`zero1` to `zero3`)."""

    AUTO = "auto"
    DDP = "ddp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Offload(StrEnum):
    """What ZeRO keeps in host memory: nothing, the optimiser's state, or (ZeRO-3) the weights too."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    PARAMETERS = "parameters"


class Compile(StrEnum):
    """What of a network `torch.compile` takes at once; `auto` is the network on GPUs and nothing on CPUs."""

    AUTO = "auto"
    NONE = "none"
    NETWORK = "network"
    BLOCKS = "blocks"


class ActivationCheckpointing(StrEnum):
    """Whose activations are not kept, but computed again for the backward pass."""

    NONE = "none"
    BLOCKS = "blocks"


class DeepSpeedSettings(Settings):
    """What can be tuned of ZeRO; none of it changes the result. Sizes are of float32 tensors, and whole MiB,
    for DeepSpeed asserts that a bucket holds an even number of elements.

    `bucket_mib` is what is communicated at once, `max_gathered_mib` how much ZeRO-3 keeps gathered of the weights,
    `gathered_below_elements` the size of the parameters that it never takes apart, and `sub_group_mib` what of the
    optimiser's state is updated at once.
    """

    bucket_mib: Positive
    overlap_communication: bool
    max_gathered_mib: Positive
    gathered_below_elements: NotNegative
    sub_group_mib: Positive


class TrainerSettings(Settings):
    """How a stage runs on its devices. Only `precision` changes what it makes.

    `devices` are those of one node. `micro_batch_size` is the most samples that one device takes at once; null means
    its whole share of the batch.
    `drop_checkpoints` has a stage remove its checkpoints once it is finished.
    `lease_s` is how many seconds a process may give no sign of life before another takes its stage over,
    `collective_timeout_s` how many the processes of a stage wait for each other before they give up,
    `hang_after_s` how long a micro-batch may take until the training is ended as one that hangs; null: as long as it
    likes.
    """

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Positive
    num_nodes: Positive
    strategy: StrategyName
    offload: Offload
    deepspeed: DeepSpeedSettings
    precision: Precision
    compile: Compile
    activation_checkpointing: ActivationCheckpointing
    micro_batch_size: Positive | None
    loader_workers: NotNegative
    cpu_threads: Positive | None
    cache_mib: NotNegative
    log_every_steps: Positive
    validate_every_samples: Positive | None
    validation_samples: Positive
    sample_every_samples: Positive | None
    evaluate_every_samples: Positive | None = None  # newer than records that lack it
    checkpoint_every_samples: Positive | None
    checkpoint_every_min: PositiveFloat
    keep_checkpoints: Positive
    drop_checkpoints: bool = False  # newer than records that lack it
    max_faulty_share: Fraction
    lease_s: PositiveFloat
    collective_timeout_s: PositiveFloat
    hang_after_s: PositiveFloat | None = None  # newer than records that lack it

    @property
    def world_size(self) -> int:
        """Processes that train together, one per device."""
        return self.devices * self.num_nodes

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> Self:
        zero = (StrategyName.ZERO1, StrategyName.ZERO2, StrategyName.ZERO3)
        allowed = zero[2:] if self.offload is Offload.PARAMETERS else zero
        if self.offload is not Offload.NONE and self.strategy not in allowed:
            raise ValueError(
                f"offload={self.offload.value} does not work with strategy={self.strategy.value}; "
                f"use {' or '.join(allowed)}, or trainer=auto, which offloads what does not fit"
            )
        return self


class TrackingMode(StrEnum):
    """Where Weights & Biases keeps its runs."""

    ONLINE = "online"
    OFFLINE = "offline"
    NONE = "none"


class TrackedArtifacts(StrEnum):
    """What W&B is given of an artifact: where it is, or a copy of its files."""

    REFERENCE = "reference"
    COPY = "copy"


class TrackingSettings(Settings):
    """Weights & Biases; `offline` needs no account and no network. `tensorboard` writes its event files as well."""

    mode: TrackingMode
    project: str
    entity: str | None
    artifacts: TrackedArtifacts
    tensorboard: bool


class MeasuredUse(Settings):
    """What share of a device's peak a stage of that kind, training so many parameters, was seen to use."""

    kind: str
    million_parameters: PositiveFloat
    mfu: Fraction


class ForecastDevice(Settings):
    """A device that one can rent. `peak_tflops` are dense, by precision; a precision without one has no single peak."""

    memory_gib: PositiveFloat
    peak_tflops: dict[Precision, PositiveFloat]
    price_per_hour: PositiveFloat | None


class ForecastSettings(Settings):
    """What `unclip plan --forecast` reckons with. `device` is `here`, which is tried, or one of `devices`.

    `mfu`, of all stages or by kind, replaces what was `measured`, on the device `measured_on`. `price_per_hour`
    replaces the device's own.
    """

    device: str
    mfu: Fraction | dict[str, Fraction] | None
    price_per_hour: PositiveFloat | None
    trial_s: PositiveFloat
    devices: dict[str, ForecastDevice]
    measured_on: str
    measured: tuple[MeasuredUse, ...]

    @model_validator(mode="after")
    def _device_is_known(self) -> Self:
        choices = [HERE, *self.devices]
        if self.device not in choices:
            raise ValueError(f"device={self.device} is no choice; there are {', '.join(choices)}")
        return self


class NotifySettings(Settings):
    """Who is told of a failure and of the end of a run or sweep: a program without a shell, and a web address.

    `webhook` may be `$NAME` of an environment variable, which keeps an address that is a secret out of the records.
    """

    command: Annotated[list[str], Field(min_length=1)] | None
    webhook: Annotated[str, Field(pattern=r"^(https?://|\$[A-Za-z_][A-Za-z0-9_]*$)")] | None


class RunSettings(Settings):
    """Which run this is. A sweep's members are named `<sweep>.<n>`, and `group` is the sweep.

    `objective` is `stage.metric`, which a sweeper of Hydra's that searches (Optuna) is to optimise.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    group: str | None = None
    objective: str | None = None


class PathSettings(Settings):
    """Everything that a run writes is below `outputs`. `also_read` are stores of others, whose artifacts do as well."""

    outputs: Path
    also_read: tuple[Path, ...] = ()

    @field_validator("also_read", mode="before")
    @classmethod
    def _is_a_list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f"{value!r} is one path and no list; write [{value}]")
        return value


class OnDamage(StrEnum):
    """What a run does about a finished stage of which a file is damaged."""

    STOP = "stop"
    REBUILD = "rebuild"


class StoreSettings(Settings):
    """How the store of artifacts is used. `on_damage`: stop and say so, or run the stage anew."""

    on_damage: OnDamage


class RunConfig(Settings):
    """A composed config. `stage` holds each stage's `kind`, its settings, and its own `trainer` overrides.

    `launch` has a `kind`, which names the launcher, and that one's own settings.

    `data` stands beside the stages so that `data=emoji` reads well; `prepare` takes it in by interpolation.
    `forecast` is read by `unclip plan --forecast` alone.
    """

    run: RunSettings
    seed: Seed
    paths: PathSettings
    store: StoreSettings
    catalog: str
    data: dict[str, Any]
    stage: dict[str, dict[str, Any]]
    trainer: TrainerSettings
    launch: dict[str, Any]
    tracking: TrackingSettings
    forecast: ForecastSettings | None = None
    notify: NotifySettings | None = None  # newer than records that lack it


S = TypeVar("S", bound=Settings)


def one_of(choices: Sequence[type[Settings]], key: str) -> Any:
    """The type of a setting that is one of several classes; its `key` says which, by a Literal in each of them."""
    if len(choices) == 1:
        return choices[0]
    return Annotated[Union[tuple(choices)], Field(discriminator=key)]  # noqa: UP007 - not known before it runs


def validate(schema: type[S], values: Mapping[str, Any], path: str = "") -> S:
    """Build settings from plain values. Raises `UserError` with the key, the value and the rule of the first fault."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(first_fault(error, values, path, schema)) from error


def stage_trainer(config: RunConfig, overrides: Mapping[str, Any], path: str) -> TrainerSettings:
    """The trainer settings of one stage: the run's, with the stage's own on top."""
    return validate(TrainerSettings, {**config.trainer.model_dump(), **overrides}, path)
