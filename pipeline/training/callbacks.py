"""What happens at step boundaries: validation, pictures, checkpoints, and stopping when asked to."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.config import TrainerSettings
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import evaluation_loader
from pipeline.data.mixing import named_seed
from pipeline.data.splits import Split
from pipeline.errors import StageInterrupted
from pipeline.picture_grid import save_grid
from pipeline.training.checkpoints import CheckpointWriter
from pipeline.training.context import StageContext
from pipeline.training.measurements import TrainingClock
from pipeline.training.module import StageModule
from pipeline.training.ranks import any_of_all_ranks, gather_objects
from pipeline.workflow.batch_shape import largest_piece
from pipeline.workflow.ownership import StageLost
from pipeline.workflow.record import MEASURED

SAMPLES = "samples"


class StepBoundary(pl.Callback):
    """Base of callbacks that act once per optimiser step. A step may take several micro-batches."""

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Call `on_micro_batch`, and `on_step` when an optimiser step was just taken."""
        assert isinstance(pl_module, StageModule)
        self.on_micro_batch(outputs, batch)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step(trainer, pl_module)

    def on_micro_batch(self, outputs: Mapping[str, Tensor], batch: ImageBatch) -> None:
        """The losses of one micro-batch, and its samples."""

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """An optimiser step was taken."""


class SeedEveryStep(pl.Callback):
    """Seeds the global generators by (seed, step, rank): whatever a network draws is the same after a resume."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = named_seed(self._seed, f"rank {trainer.global_rank}", batch_idx)
        if pl_module.device.type == "cpu":
            # What torch.manual_seed does besides is for devices, and takes as long as a layer of a small network.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)


class Validation(StepBoundary):
    """Validates with the averaged weights, at intervals of `validate_every_samples` and at the end.

    Only the first process validates. So only it needs room for the whole network, and the metrics are the same for any
    number of processes.
    """

    def __init__(self, context: StageContext, images: CaptionedImages, clock: TrainingClock) -> None:
        self._context = context
        self._images = images
        self._clock = clock
        self.latest: dict[str, float] = {}

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Validate when it is due."""
        settings = self._context.frozen.trainer
        batch = module.stage_settings.global_batch_size
        is_last = trainer.global_step == trainer.max_steps
        if not is_last and not crosses(settings.validate_every_samples, module.samples_seen, batch):
            return
        self._context.progress.update(activity="validating")
        with module.averaged() as evaluates, trainer.precision_plugin.val_step_context():
            batches = _validation_batches(self._context, self._images, module)
            metrics = module.validation_metrics(batches) if evaluates else {}
        self.latest = trainer.strategy.broadcast(metrics)
        row = {f"validation/{name}": value for name, value in self.latest.items()}
        row[f"{MEASURED}elapsed_s"] = self._clock.elapsed_s
        self._context.tracker.log(module.samples_seen, row)

    def state_dict(self) -> dict[str, Any]:
        """The last metrics. A run that was killed after its last step has them from its checkpoint."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last metrics back."""
        self.latest = state_dict["latest"]


class Evaluations(StepBoundary):
    """Measures what the network makes, with the averaged weights, at intervals of `evaluate_every_samples`.

    The first process alone does, as in a validation. It does not change what is trained.
    """

    def __init__(self, context: StageContext, images: CaptionedImages, every_samples: int | None) -> None:
        self._context = context
        self._images = images
        self._every_samples = every_samples

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Measure when it is due."""
        is_due = crosses(self._every_samples, module.samples_seen, module.stage_settings.global_batch_size)
        if not module.has_evaluation or not is_due:
            return
        self._context.progress.update(activity="evaluating")
        with module.averaged() as evaluates, trainer.precision_plugin.val_step_context():
            batches = _validation_batches(self._context, self._images, module)
            metrics = module.evaluation_metrics(batches) if evaluates and not self._context.is_lost else {}
        if metrics:
            row = {f"evaluation/{name}": value for name, value in metrics.items()}
            self._context.tracker.log(module.samples_seen, row)


class Pictures(StepBoundary):
    """Saves and logs a grid of samples at intervals of `sample_every_samples`, and at the end."""

    def __init__(self, context: StageContext, every_samples: int | None) -> None:
        self._context = context
        self._every_samples = every_samples

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Make a grid when one is due."""
        batch = module.stage_settings.global_batch_size
        is_last = trainer.global_step == trainer.max_steps
        if not module.has_sample_grid:
            return
        if not is_last and not crosses(self._every_samples, module.samples_seen, batch):
            return
        self._context.progress.update(activity="drawing samples")
        with module.averaged() as evaluates, trainer.precision_plugin.val_step_context():
            grid = module.sample_grid() if evaluates and not self._context.is_lost else None
        if grid is None:
            return
        path = self._context.work / SAMPLES / f"samples-{module.samples_seen:012}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(grid.image, grid.layout, path)
        self._context.tracker.log_picture(module.samples_seen, "samples", path, grid.captions)


class Checkpoints(StepBoundary):
    """Saves every so many samples or minutes, and when asked to stop. All processes stop at the same step.

    Training goes on while a checkpoint is written. It waits for the last one, and for the one at which it stops.
    """

    def __init__(self, context: StageContext, settings: TrainerSettings, clock: TrainingClock) -> None:
        self._context = context
        self._settings = settings
        self._clock = clock
        self._writer = CheckpointWriter(context, settings.keep_checkpoints)
        self._last_save = time.monotonic()

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Save when it is due, and stop when asked to."""
        settings = self._settings
        minutes = (time.monotonic() - self._last_save) / 60
        is_lost, is_asked, is_late, is_busy = any_of_all_ranks(
            trainer,
            self._context.is_lost,
            self._context.interruption.is_set(),
            minutes >= settings.checkpoint_every_min,
            self._writer.is_busy,
        )
        if is_lost:
            raise StageLost(f"stage {self._context.frozen.stage} was taken over by another process")
        if not is_busy:
            self._writer.finish()
        is_due = crosses(
            settings.checkpoint_every_samples, module.samples_seen, module.stage_settings.global_batch_size
        )
        is_last = trainer.global_step == trainer.max_steps
        if is_asked or is_late or is_due or is_last:
            self._context.progress.update(activity="taking a checkpoint")
            self._last_save = time.monotonic()
            self._writer.begin(trainer, module.samples_seen, self._clock.elapsed_s)
        if is_asked or is_last:
            self._writer.finish()
        if is_asked and not is_last:
            raise StageInterrupted(f"stage {self._context.frozen.stage} stopped at {module.samples_seen} samples")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make the checkpoint that is being written, where no other process is needed for it; else leave it."""
        if trainer.world_size > 1 or self._context.is_lost or not isinstance(exception, Exception):
            self._writer.give_up()
            return
        try:
            self._writer.finish()
        except (OSError, StageLost) as error:  # what ended training is the one to be told of
            print(f"the checkpoint that was being written is lost ({error})", flush=True)


class ResumeAtSamples(pl.Callback):
    """Sets Lightning's count of micro-batches on a resume. Devices and micro-batches may differ by then."""

    def __init__(self, steps_done: int, micro_batches_per_step: int) -> None:
        self._done = steps_done * micro_batches_per_step

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that all processes found the same checkpoint: one may be damaged, or appear, between two looks."""
        if len(set(gather_objects(self._done))) > 1:
            raise RuntimeError("the processes of this stage found different checkpoints; run it again")

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Change the counts before the loops take them from the checkpoint."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), self._done)


def is_row_due(trainer: pl.Trainer, settings: TrainerSettings) -> bool:
    """Whether the step just taken is one after which a row is written."""
    return trainer.global_step % settings.log_every_steps == 0 or trainer.global_step == trainer.max_steps


def _validation_batches(context: StageContext, images: CaptionedImages, module: StageModule) -> Iterator[ImageBatch]:
    """The validation split's first samples, on the module's device."""
    settings = context.frozen.trainer
    loader = evaluation_loader(
        images,
        split=Split.VALIDATION,
        batch_size=largest_piece(module.stage_settings.global_batch_size, settings.micro_batch_size),
        limit=settings.validation_samples,
        workers=settings.loader_workers,
        pin_memory=module.device.type == "cuda",
    )
    for batch in loader:
        yield batch.to(module.device, non_blocking=True)


def crosses(every: int | None, samples_seen: int, batch: int) -> bool:
    """Whether the step that ended at `samples_seen` reached a multiple of `every`."""
    return every is not None and samples_seen // every > (samples_seen - batch) // every
