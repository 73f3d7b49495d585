"""How fast a stage will train: as in a trial here, or by a device's peak and the share of it that was measured."""

import math
import time
from dataclasses import dataclass, replace

import psutil
import torch

from pipeline.config import HERE, ForecastSettings, TrainerSettings
from pipeline.forecast.count import Count
from pipeline.forecast.rehearsal import Rehearsal, Training
from pipeline.forecast.trial import try_training
from pipeline.training.hardware import accelerator_of
from pipeline.workflow.batch_shape import BatchShape
from pipeline.workflow.declaration import Catalog

_GIB = 2**30
_LONGEST_TRIAL_S = 60.0
_FURTHEST = 4.0
"""Times more or fewer parameters than were measured, of which a measured share of the peak still tells something."""


@dataclass(frozen=True)
class Target:
    """What the forecast is for: this machine, where steps are tried, or a device by whose peak rates are reckoned."""

    name: str
    is_here: bool
    is_cuda: bool
    memory_bytes: int
    price_per_hour: float | None


@dataclass(frozen=True)
class Rate:
    """How fast a stage trains, and where that is from. `aside_s` are the seconds of its validations and pictures."""

    samples_per_s: float | None
    note: str
    aside_s: float = 0.0
    processor_s: float | None = None


def target_of(settings: ForecastSettings, trainer: TrainerSettings) -> Target:
    """What `forecast.device` names."""
    if settings.device != HERE:
        device = settings.devices[settings.device]
        price = settings.price_per_hour or device.price_per_hour
        return Target(settings.device, False, True, int(device.memory_gib * _GIB), price)
    if accelerator_of(trainer) == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Target(properties.name, True, True, properties.total_memory, settings.price_per_hour)
    memory_bytes = psutil.virtual_memory().total // trainer.devices
    return Target("this machine", True, False, memory_bytes, settings.price_per_hour)


def tried_rate(
    rehearsal: Rehearsal,
    shape: BatchShape,
    count: Count,
    memory_bytes: float,
    target: Target,
    settings: ForecastSettings,
    samples: int,
) -> Rate:
    """The rate of steps that are tried on this machine, unless they are too large for it."""
    if memory_bytes > psutil.virtual_memory().available and not target.is_cuda:
        return Rate(None, "not tried: it needs more memory than is free here")
    trainer = rehearsal.trainer
    rate = _matrix_flops()
    micro_batch_s = count.flops / count.samples * shape.micro_batch_size / rate
    if 4 * micro_batch_s > _LONGEST_TRIAL_S:
        return Rate(None, f"not tried: a micro-batch takes {micro_batch_s:,.0f} s here or longer")
    here = replace(rehearsal, mode=None)
    training = here.rehearsed
    assert isinstance(training, Training), "as before"
    trial = try_training(here, training, shape, settings.trial_s)
    own = training.module.stage_settings
    validations = _times(samples, trainer.validate_every_samples)
    grids = _times(samples, trainer.sample_every_samples)
    aside_s = validations * trial.validation.clock_s + grids * trial.grid.clock_s
    processor_s = samples / own.global_batch_size * trial.step.processor_s
    processor_s += validations * trial.validation.processor_s + grids * trial.grid.processor_s
    rate = own.global_batch_size / trial.step.clock_s
    how = " without torch.compile" if target.is_cuda else ""
    return Rate(rate, f"steps, validation and pictures were tried here{how}", aside_s, processor_s)


def _times(samples: int, every: int | None) -> int:
    """How often something happens that happens at intervals and at the end."""
    return 1 + (0 if every is None else (samples - 1) // every)


def reckoned_rate(
    kind: str,
    parameters: int,
    flops_per_sample: float,
    trainer: TrainerSettings,
    target: Target,
    settings: ForecastSettings,
    catalog: Catalog,
) -> Rate:
    """The rate from the device's peak and the share of it that such stages were seen to use."""
    peak = settings.devices[target.name].peak_tflops.get(trainer.precision)
    if peak is None:
        return Rate(None, f"no peak of {target.name} in {trainer.precision.value}; set trainer.precision=bf16-mixed")
    mfu, origin = _use(kind, parameters, target, settings, catalog)
    if mfu is None:
        return Rate(None, f"{origin}; set 'forecast.mfu={{{kind}: 0.3}}'")
    rate = mfu * peak * 1e12 * trainer.world_size / flops_per_sample
    return Rate(rate, f"{mfu:.1%} of the peak, {origin}; start-up, validation and pictures come on top")


def _use(
    kind: str, parameters: int, target: Target, settings: ForecastSettings, catalog: Catalog
) -> tuple[float | None, str]:
    """The share of the peak that the stage will use, and where that is from.

    Between measured sizes it is interpolated over the logarithm of the parameters. Near beyond them the nearest holds.
    """
    if isinstance(settings.mfu, float | int):
        return float(settings.mfu), "as set by forecast.mfu"
    if settings.mfu is not None and kind in settings.mfu:
        return settings.mfu[kind], "as set by forecast.mfu"
    work = catalog.stages[kind].run
    rows = sorted(
        (each for each in settings.measured if each.kind in catalog.stages and catalog.stages[each.kind].run == work),
        key=lambda each: each.million_parameters,
    )
    if not rows:
        return None, f"no stage of kind {kind} was measured on a GPU"
    where = [math.log(each.million_parameters) for each in rows]
    here = math.log(max(parameters, 1) / 1e6)
    above = next((place for place, each in enumerate(where) if each >= here), len(rows))
    sizes = f"{' and '.join(f'{each.million_parameters:,.0f}' for each in rows)} M parameters"
    origin = f"measured on {settings.measured_on} at {sizes}"
    if target.name != settings.measured_on:
        origin += f" and not on {target.name}"
    if above == 0 or above == len(rows):
        nearest = min(above, len(rows) - 1)
        if abs(here - where[nearest]) > math.log(_FURTHEST):
            return None, f"{parameters / 1e6:,.0f} M parameters are far from what was {origin}"
        return rows[nearest].mfu, origin
    share = (here - where[above - 1]) / (where[above] - where[above - 1])
    return (1 - share) * rows[above - 1].mfu + share * rows[above].mfu, origin


def _matrix_flops(size: int = 1024) -> float:
    """The rate of a float32 matrix product on this machine, in FLOP/s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    started = time.monotonic()
    float((matrix @ matrix)[0, 0])
    return 2 * size**3 / (time.monotonic() - started)
