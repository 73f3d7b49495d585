"""From counts and rates to hours, memory and disk. What is not known is None, and a note says why."""

import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config import ActivationCheckpointing, ForecastSettings, StrategyName
from pipeline.errors import UserError
from pipeline.forecast.count import Count, count_pass, count_training
from pipeline.forecast.rates import Target, reckoned_rate, target_of, tried_rate
from pipeline.forecast.rehearsal import ExpectedData, Pass, Passes, Rehearsal, Training, rehearsals_of, rehearsing
from pipeline.forecast.trial import try_pass
from pipeline.training.compiling import checkpoint_activations
from pipeline.training.disk import artifact_bytes, checkpoint_bytes, training_bytes
from pipeline.training.stage import THREADS_AT_START
from pipeline.training.strategies.choose import (
    GRADIENT_BYTES,
    Device,
    choose_strategy,
    state_bytes_per_parameter,
)
from pipeline.training.strategies.fragments import trained_parameters
from pipeline.workflow.batch_shape import BatchShape, shape_of_batch
from pipeline.workflow.declaration import Catalog, resolve
from pipeline.workflow.plan import Action, Plan, PlannedStage
from pipeline.workflow.progress import latest_checkpoint_samples

_GIB = 2**30
_COUNTED_SAMPLES = 2
_LEAST_PIECES = 2
"""A stage that computes its pieces twice does so from two on."""


@dataclass(frozen=True)
class StageForecast:
    """What a stage will take from now on; `samples` are those left to see.

    `duration_s` are seconds on the clock, `processor_s` those of this machine's processors, where it was tried here.
    `memory_bytes` is that of one device. `loader_per_s` are the samples that its loader can read in a second, here;
    None too where the pictures are read once and then kept in memory.
    """

    name: str
    kind: str
    action: Action
    samples: int | None = None
    parameters: int | None = None
    flops_per_sample: float | None = None
    memory_bytes: float | None = None
    samples_per_s: float | None = None
    duration_s: float | None = None
    processor_s: float | None = None
    devices: int = 1
    samples_per_shard: float | None = None
    loader_per_s: float | None = None
    artifact_bytes: int | None = None
    work_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return None if self.duration_s is None else self.duration_s * self.devices / 3600

    @property
    def shards_per_s(self) -> float | None:
        """How many shards it reads in a second."""
        if self.samples_per_s is None or self.samples_per_shard is None:
            return None
        return self.samples_per_s / self.samples_per_shard


@dataclass(frozen=True)
class Forecast:
    """Of every stage that is left to do; `free_bytes` has the disk of `outputs`."""

    target: Target
    stages: tuple[StageForecast, ...]
    outputs: Path
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """What all stages write that is known."""
        return sum((each.artifact_bytes or 0) + (each.work_bytes or 0) for each in self.stages)

    @property
    def unknown_sizes(self) -> list[str]:
        """The stages of which it is not known what they write."""
        return [
            each.name
            for each in self.stages
            if each.action is not Action.REUSE and (each.artifact_bytes is None or each.work_bytes is None)
        ]


def forecast(plan: Plan, only: Collection[str] | None = None) -> Forecast:
    """Forecast the stages of a plan that are not finished, `only` some where these are named.

    Raises `UserError` where the config has no settings for it.
    """
    with rehearsing():
        return _forecast(plan, only)


def _forecast(plan: Plan, only: Collection[str] | None) -> Forecast:
    settings = plan.config.forecast
    if settings is None:
        raise UserError("this config has no key forecast; add forecast: devices to its defaults")
    catalog: Catalog = resolve(plan.config.catalog)
    target = target_of(settings, plan.config.trainer)
    rehearsals = rehearsals_of(plan, FakeTensorMode(allow_non_fake_inputs=True))
    found: list[StageForecast] = []
    for stage in plan.stages:
        rehearsal = rehearsals.get(stage.name)
        if rehearsal is None:
            found.append(StageForecast(stage.name, stage.kind, stage.action, notes=(f"blocked: {stage.reason}",)))
            continue
        if only is not None and stage.name not in only:
            continue
        if stage.action is Action.REUSE:
            found.append(StageForecast(stage.name, stage.kind, stage.action, notes=(stage.reason,)))
            continue
        found.append(_of_stage(stage, rehearsal, target, settings, catalog))
    return Forecast(target, tuple(found), plan.store.outputs, shutil.disk_usage(_existing(plan.store.outputs)).free)


def _of_stage(
    stage: PlannedStage, rehearsal: Rehearsal, target: Target, settings: ForecastSettings, catalog: Catalog
) -> StageForecast:
    blank = StageForecast(stage.name, stage.kind, stage.action)
    torch.set_num_threads(rehearsal.trainer.cpu_threads or THREADS_AT_START)
    match rehearsal.rehearsed:
        case Training() as training:
            return _of_training(blank, stage, rehearsal, training, target, settings, catalog)
        case Passes() as passes:
            return _of_passes(blank, rehearsal, passes, target, settings)
        case ExpectedData() as data:
            return _of_data(blank, data)
        case None:
            return replace(blank, notes=("nothing is known of this kind of stage",))


def _of_data(blank: StageForecast, data: ExpectedData) -> StageForecast:
    duration_s = data.samples * data.seconds_per_sample if data.samples and data.seconds_per_sample else None
    return replace(
        blank,
        samples=data.samples,
        samples_per_s=1 / data.seconds_per_sample if data.seconds_per_sample else None,
        duration_s=duration_s,
        artifact_bytes=data.artifact_bytes,
        work_bytes=0,
        notes=("the first few pictures were made here",) if data.seconds_per_sample else (),
    )


def _of_passes(
    blank: StageForecast, rehearsal: Rehearsal, passes: Passes, target: Target, settings: ForecastSettings
) -> StageForecast:
    done = replace(blank, artifact_bytes=passes.artifact_bytes, work_bytes=passes.work_bytes)
    if not passes.passes:
        return done
    samples = passes.passes[0].samples
    if any(once.samples is None for once in passes.passes) or samples is None:
        return replace(done, notes=("the number of samples is not known before the data is prepared",))
    bare = replace(rehearsal, mode=torch.device("meta"))
    flops = memory_bytes = 0.0
    for once in _passes_of(bare):
        count = count_pass(once.forward, bare.batch(_COUNTED_SAMPLES, once.image_size, once.tokenizer))
        flops += count.flops / count.samples * (once.samples or 0)
        memory_bytes = max(memory_bytes, count.activation_bytes / count.samples * once.batch_size)
    done = replace(
        done, samples=samples, flops_per_sample=flops / samples, memory_bytes=memory_bytes + passes.weight_bytes
    )
    if not target.is_here:
        return replace(done, notes=("of what it reaches no share of a peak was measured",))
    here = replace(rehearsal, mode=None)
    spent = [(try_pass(here, once, settings.trial_s), once.samples or 0) for once in _passes_of(here)]
    duration_s = sum(each.clock_s * count for each, count in spent)
    processor_s = sum(each.processor_s * count for each, count in spent)
    note = "some pictures were tried here"
    return replace(
        done, duration_s=duration_s, processor_s=processor_s, samples_per_s=samples / duration_s, notes=(note,)
    )


def _passes_of(rehearsal: Rehearsal) -> tuple[Pass, ...]:
    rehearsed = rehearsal.rehearsed
    assert isinstance(rehearsed, Passes), f"{rehearsal.name} trains nothing"
    return rehearsed.passes


def _of_training(
    blank: StageForecast,
    stage: PlannedStage,
    rehearsal: Rehearsal,
    training: Training,
    target: Target,
    settings: ForecastSettings,
    catalog: Catalog,
) -> StageForecast:
    assert stage.frozen is not None, "a blocked stage is not forecast"
    module, trainer = training.module, rehearsal.trainer
    own = module.stage_settings
    shape = shape_of_batch(own.global_batch_size, trainer)
    parameters = sum(each.numel() for each in trained_parameters(module.network).values())
    count = _count_step(rehearsal, training, shape)
    memory_bytes, memory_note = _memory(rehearsal, training, count, shape, parameters, target)
    seen = latest_checkpoint_samples(stage.frozen.work) or 0
    samples = own.max_steps * own.global_batch_size - seen
    flops_per_sample = count.flops / count.samples
    notes = [memory_note] if memory_note else []
    if target.is_here:
        rate = tried_rate(rehearsal, shape, count, memory_bytes, target, settings, samples)
    else:
        rate = reckoned_rate(blank.kind, parameters, flops_per_sample, trainer, target, settings, catalog)
    notes.append(rate.note)
    decode_s = rehearsal.data.decode_s
    here_s = training.setup_s
    if target.is_here and trainer.loader_workers == 0 and decode_s:
        here_s += _pictures_read(rehearsal, training.image_size, samples) * decode_s(training.image_size)
    aside_s = rate.aside_s + here_s
    if "data" in rehearsal.inputs and not rehearsal.knows_captions(shape.micro_batch_size):
        notes.append("a caption is taken to fill the context, as few are known before the data is prepared")
    reads_all = _pictures_read(rehearsal, training.image_size, samples) == samples
    return replace(
        blank,
        samples=samples,
        parameters=parameters,
        flops_per_sample=flops_per_sample,
        memory_bytes=memory_bytes,
        samples_per_s=rate.samples_per_s,
        duration_s=samples / rate.samples_per_s + aside_s if rate.samples_per_s else None,
        processor_s=None if rate.processor_s is None else rate.processor_s + here_s,
        devices=trainer.world_size,
        samples_per_shard=rehearsal.data.samples_per_shard,
        loader_per_s=max(1, trainer.loader_workers) * trainer.world_size / decode_s(training.image_size)
        if decode_s and reads_all
        else None,
        artifact_bytes=artifact_bytes(module.network),
        work_bytes=training_bytes(module.network, own, trainer) - artifact_bytes(module.network),
        notes=tuple(notes),
    )


def _pictures_read(rehearsal: Rehearsal, image_size: int, samples: int) -> int:
    """How many pictures are decoded until `samples` were seen: each one once, where the cache holds all."""
    known = rehearsal.data.samples
    is_cached = known is not None and known * 3 * image_size**2 <= rehearsal.trainer.cache_mib * 2**20
    return min(samples, known) if known is not None and is_cached else samples


def _count_step(rehearsal: Rehearsal, training: Training, shape: BatchShape) -> Count:
    module = training.module
    module.hold_at_most(shape.micro_batch_size)
    if rehearsal.trainer.activation_checkpointing is ActivationCheckpointing.BLOCKS:
        checkpoint_activations(module.network, module.block_classes)
    pieces = min(shape.accumulation, _LEAST_PIECES) if module.needs_whole_share else 1
    batch = rehearsal.batch(shape.micro_batch_size * pieces, training.image_size, training.tokenizer)
    return count_training(module, batch, rehearsal.trainer.precision)


def _memory(
    rehearsal: Rehearsal, training: Training, count: Count, shape: BatchShape, parameters: int, target: Target
) -> tuple[float, str | None]:
    """Bytes on a device at most while it trains, and what is to be said of them."""
    module, trainer = training.module, rehearsal.trainer
    device = Device(target.name, target.memory_bytes, target.is_cuda)
    choice = choose_strategy(trainer, parameters, device)
    state = state_bytes_per_parameter(choice.strategy, choice.offload, trainer.world_size) * parameters
    fixed = sum(each.nbytes for frozen in module.frozen_networks for each in frozen.state_dict().values()) + state
    is_whole = choice.strategy is StrategyName.DDP and trainer.world_size == 1
    if is_whole and (shape.accumulation == 1 or module.needs_whole_share):
        # Gradients come as activations go; they are there together with nothing but what is left of these.
        total = fixed - GRADIENT_BYTES * parameters + count.held_bytes
    else:
        total = fixed + count.activation_bytes
    if not target.is_cuda:
        total += psutil.Process().memory_info().rss
        # A checkpoint is written from a copy of the state, where there is room for one.
        copied = checkpoint_bytes(module.network, module.stage_settings) / trainer.world_size
        total += copied if 2 * copied <= target.memory_bytes - total else 0
    if total <= target.memory_bytes:
        return total, None
    room, of_a_sample = target.memory_bytes - fixed, count.activation_bytes / shape.micro_batch_size
    fits = int(room / of_a_sample) if room > 0 else 0
    remedy = (
        f"set stage.{rehearsal.name}.trainer.micro_batch_size={2 ** int(math.log2(fits))}"
        if fits
        else "use more devices, trainer=zero3, or a device with more memory"
    )
    return total, f"does not fit the {target.memory_bytes / _GIB:,.0f} GiB of {target.name}: {remedy}"


def _existing(path: Path) -> Path:
    """The directory itself, or the nearest above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())
