"""The one place that assembles a Trainer."""

import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from typing_extensions import override

from pipeline.config import ActivationCheckpointing, Compile
from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import training_loader
from pipeline.data.splits import Split
from pipeline.errors import UserError
from pipeline.training.callbacks import (
    SAMPLES,
    Checkpoints,
    Evaluations,
    Pictures,
    ResumeAtSamples,
    SeedEveryStep,
    Validation,
)
from pipeline.training.compiling import StopCompiling, checkpoint_activations, choose_compile, compiled
from pipeline.training.context import StageContext
from pipeline.training.disk import require_disk
from pipeline.training.hardware import accelerator_of, record_hardware
from pipeline.training.measurements import Measurements, TrainingClock
from pipeline.training.module import StageModule
from pipeline.training.non_finite import NonFiniteGuard
from pipeline.training.precision import float32_products, multiply_in_bf16
from pipeline.training.processes import process_environment
from pipeline.training.rows import Rows
from pipeline.training.strategies.choose import build_strategy
from pipeline.training.strategies.portable import PortableStrategy
from pipeline.training.watch import HangWatch
from pipeline.workflow.batch_shape import BatchShape, shape_of_batch
from pipeline.workflow.causes import Cause
from pipeline.workflow.checkpoint import Checkpoint, latest_checkpoint
from pipeline.workflow.progress import COMPILER_CACHE, Failure, Phase, read_failure, write_failure


@dataclass(frozen=True)
class FitResult:
    """What training ended with: the counter and the last validation's metrics."""

    samples_seen: int
    metrics: dict[str, float]


def fit(context: StageContext, module: StageModule, images: CaptionedImages) -> FitResult:
    """Train until `max_samples`, from the last checkpoint if there is one. The network then has the averaged weights.

    Where `max_samples` is 0 the network stays as it is.
    Raises `StageInterrupted` after a requested stop, and `UserError` at once if there is nothing to validate on.
    """
    if module.stage_settings.max_samples == 0:
        return FitResult(0, {})
    if len(images.data.samples_in(Split.VALIDATION)) == 0:
        raise UserError(
            f"the split {Split.VALIDATION} has no samples, and training ends with a validation; raise "
            "data.validation_fraction or add samples"
        )
    settings = context.frozen.trainer
    if context.is_first_process:
        require_disk(context.frozen.stage, module.network, module.stage_settings, settings, context.work)
    strategy, choice = build_strategy(settings, module.network, partial(_keep_death, context))
    print(f"training by {choice.title} on {settings.world_size} devices ({choice.reason})", flush=True)
    compile_choice = choose_compile(settings, choice.strategy, is_cuda=accelerator_of(settings) == "cuda")
    print(f"compiling: {compile_choice.kind.value} ({compile_choice.reason})", flush=True)
    record_hardware(context, choice.title)
    checkpoint = latest_checkpoint(context.work)
    samples_seen = checkpoint.samples_seen if checkpoint else 0
    stage_settings = module.stage_settings
    context.progress.update(
        phase=Phase.STARTING,
        max_samples=stage_settings.max_steps * stage_settings.global_batch_size,
        samples_seen=samples_seen,
    )
    shape = shape_of_batch(stage_settings.global_batch_size, settings)
    module.hold_at_most(shape.micro_batch_size)
    if module.needs_whole_share:
        shape = BatchShape(shape.micro_batch_size * shape.accumulation, 1)
    steps_done = samples_seen // stage_settings.global_batch_size
    loader = training_loader(
        images,
        split=Split.TRAIN,
        seed=context.frozen.seed,
        global_batch_size=stage_settings.global_batch_size,
        micro_batch_size=shape.micro_batch_size,
        rank=context.process.rank,
        world_size=settings.world_size,
        first_batch=steps_done,
        batches=stage_settings.max_steps,
        workers=settings.loader_workers,
        pin_memory=accelerator_of(settings) == "cuda",
    )
    clock = TrainingClock(checkpoint.elapsed_s if checkpoint else 0.0)
    validation = Validation(context, images, clock)
    kind = compile_choice.kind
    trainer = _assemble(context, module, images, shape, validation, clock, checkpoint, strategy, kind)
    if checkpoint is not None:
        print(f"resuming from {checkpoint.path.name}, which {checkpoint.writers} processes wrote", flush=True)
    if settings.activation_checkpointing is ActivationCheckpointing.BLOCKS:
        checkpoint_activations(module.network, module.block_classes)
    multiply_in_bf16((module.network, *module.frozen_networks), settings, accelerator_of(settings))
    with (
        compiled(module, kind, context.frozen.outputs / COMPILER_CACHE),
        float32_products(settings, is_cuda=accelerator_of(settings) == "cuda"),
    ):
        trainer.fit(module, loader, ckpt_path=checkpoint.path if checkpoint else None, weights_only=True)
    assert trainer.global_step == stage_settings.max_steps, "training ended early, and nothing said why"
    strategy.leave_averaged_weights()
    _keep_last_picture(context)
    return FitResult(module.samples_seen, validation.latest)


def _assemble(
    context: StageContext,
    module: StageModule,
    images: CaptionedImages,
    shape: BatchShape,
    validation: Validation,
    clock: TrainingClock,
    checkpoint: Checkpoint | None,
    strategy: PortableStrategy,
    compile_kind: Compile,
) -> pl.Trainer:
    settings = context.frozen.trainer
    steps_done = checkpoint.samples_seen // module.stage_settings.global_batch_size if checkpoint else 0
    measurements = Measurements(clock, settings.precision)
    return _Trainer(
        accelerator=accelerator_of(settings),
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        plugins=[process_environment(settings.world_size)],
        # A strategy that brings its own precision has it by the same setting.
        precision=None
        if isinstance(strategy.precision_plugin, DeepSpeedPrecision)
        else settings.precision.of_lightning,
        max_steps=module.stage_settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=shape.accumulation,
        gradient_clip_val=module.stage_settings.optimizer.gradient_clip_norm,
        callbacks=[
            *([] if settings.hang_after_s is None else [HangWatch(context, settings.hang_after_s)]),
            SeedEveryStep(context.frozen.seed),
            ResumeAtSamples(steps_done, shape.accumulation),
            NonFiniteGuard(context, settings, images, module.stage_settings.optimizer.non_finite),
            measurements,
            *([] if compile_kind is Compile.NONE else [StopCompiling()]),
            Rows(context, settings, images, measurements),
            validation,
            Evaluations(context, images, settings.evaluate_every_samples),
            Pictures(context, settings.sample_every_samples),
            Checkpoints(context, settings, clock),
        ],
        profiler=measurements.loader_wait,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=context.work,
    )


class _NoSignals(_SignalConnector):
    @override
    def register_signal_handlers(self) -> None:
        """Leave signals alone. Stopping is decided at step boundaries, by all processes together: see `Checkpoints`.

        Lightning's handler of SIGTERM ends `fit` in mid-step as if it were finished, and broadcasts from inside.
        """


class _Trainer(pl.Trainer):
    @override
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._signal_connector = _NoSignals(self)


def _keep_death(context: StageContext, died: str) -> None:
    print(died, flush=True)
    if read_failure(context.work) is None:
        write_failure(context.work, Failure(died, False, Cause.COLLECTIVE))


def _keep_last_picture(context: StageContext) -> None:
    pictures = sorted((context.work / SAMPLES).glob("*.png"))
    if pictures and context.is_first_process:
        shutil.copyfile(pictures[-1], context.output / f"{SAMPLES}.png")
