"""Steps that are tried on this machine, with the real networks, losses and optimiser on random pictures."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils import get_total_norm

from pipeline.config import ActivationCheckpointing
from pipeline.forecast.count import lightning
from pipeline.forecast.rehearsal import Pass, Rehearsal, Training
from pipeline.training.compiling import checkpoint_activations
from pipeline.training.hardware import accelerator_of
from pipeline.training.module import LOSS, StageModule
from pipeline.training.optimizer import build_optimizer
from pipeline.training.precision import multiply_in_bf16
from pipeline.workflow.batch_shape import BatchShape, largest_piece

_STEPS_AT_LEAST = 3
_WARM_UP_SAMPLES, _TRIED_SAMPLES = 2, 16


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock and of all processors; on a machine that others use too the second is the steadier one."""

    clock_s: float
    processor_s: float


@dataclass(frozen=True)
class Trial:
    """What a step of the global batch, a validation and a grid of samples take."""

    step: Spent
    validation: Spent
    grid: Spent


def try_training(rehearsal: Rehearsal, training: Training, shape: BatchShape, trial_s: float) -> Trial:
    """Train for about `trial_s` seconds, at least three steps, after one that warms up; then validate and draw."""
    module, trainer = training.module, rehearsal.trainer
    settings = module.stage_settings
    device = torch.device(accelerator_of(trainer))
    module.trainer = lightning(trainer.precision, accelerator_of(trainer))
    module.to(device)
    for frozen in module.frozen_networks:
        frozen.to(device)
    module.train()
    module.hold_at_most(shape.micro_batch_size)
    if trainer.activation_checkpointing is ActivationCheckpointing.BLOCKS:
        checkpoint_activations(module.network, module.block_classes)
    multiply_in_bf16((module.network, *module.frozen_networks), trainer, device.type)
    optimizer = build_optimizer(module.network, settings.optimizer, module.parameter_ranges, fused=True)
    at_once = shape.micro_batch_size * (shape.accumulation if module.needs_whole_share else 1)
    batch = rehearsal.batch(at_once, training.image_size, training.tokenizer)
    pieces = settings.global_batch_size // trainer.world_size // at_once

    def step() -> None:
        for _ in range(pieces):
            (module.training_step(batch.to(device), 0)[LOSS] / pieces).backward()
        gradients = [each.grad for each in module.network.parameters() if each.grad is not None]
        optimizer.prepare_step(get_total_norm(gradients), settings.optimizer.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        module.step_losses.clear()

    return Trial(
        _mean_of(step, trial_s), _once(lambda: _validate(rehearsal, training, device)), _once(lambda: _draw(module))
    )


def try_pass(rehearsal: Rehearsal, once: Pass, trial_s: float) -> Spent:
    """What a sample takes in a pass without gradients: of a few, and of a whole batch where that is quick."""
    device = accelerator_of(rehearsal.trainer)

    def spent_on(samples: int) -> Spent:
        batch = rehearsal.batch(samples, once.image_size, once.tokenizer).to(device)
        with torch.no_grad(), lightning(rehearsal.trainer.precision, device).precision_plugin.forward_context():
            return _once(lambda: once.forward(batch))

    spent_on(_WARM_UP_SAMPLES)
    samples = min(_TRIED_SAMPLES, once.batch_size)
    spent = spent_on(samples)
    if spent.clock_s / samples * once.batch_size < trial_s:
        samples = once.batch_size
        spent = spent_on(samples)
    return Spent(spent.clock_s / samples, spent.processor_s / samples)


def _validate(rehearsal: Rehearsal, training: Training, device: torch.device) -> None:
    module, trainer = training.module, rehearsal.trainer
    size = largest_piece(module.stage_settings.global_batch_size, trainer.micro_batch_size)
    known = rehearsal.data.samples
    samples = trainer.validation_samples if known is None else min(trainer.validation_samples, known)
    batches = rehearsal.batch(samples, training.image_size, training.tokenizer).split(size)
    module.eval()
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        module.validation_metrics(each.to(device) for each in batches)


def _draw(module: StageModule) -> None:
    if module.has_sample_grid:
        module.eval()
        with torch.no_grad():
            module.sample_grid()


def _mean_of(step: Callable[[], None], trial_s: float) -> Spent:
    step()
    _settle()
    clock, processor, steps = time.monotonic(), time.process_time(), 0
    while steps < _STEPS_AT_LEAST or time.monotonic() - clock < trial_s:
        step()
        _settle()
        steps += 1
    return Spent((time.monotonic() - clock) / steps, (time.process_time() - processor) / steps)


def _once(work: Callable[[], object]) -> Spent:
    clock, processor = time.monotonic(), time.process_time()
    work()
    _settle()
    return Spent(time.monotonic() - clock, time.process_time() - processor)


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
