"""What happens at step boundaries: rows, validation, pictures, checkpoints, and stopping when asked to."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from pipeline.config import TrainerSettings
from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import evaluation_loader
from pipeline.data.mixing import named_seed
from pipeline.data.splits import Split
from pipeline.errors import StageInterrupted, UserError
from pipeline.training.checkpoints import save_checkpoint
from pipeline.training.context import StageContext
from pipeline.training.module import LOSS, StageModule
from pipeline.workflow.progress import Phase

RATE_SMOOTHING = 0.9
SAMPLES = "samples"


class StepBoundary(pl.Callback):
    """Base of callbacks that act once per optimiser step, not once per micro-batch."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lightning's hook; calls `on_step` when an optimiser step was just taken."""
        assert isinstance(pl_module, StageModule)
        self.on_micro_batch(outputs)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step(trainer, pl_module)

    def on_micro_batch(self, outputs: Mapping[str, Tensor]) -> None:
        """The losses of one micro-batch."""

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """An optimiser step was taken."""


class SeedEveryStep(pl.Callback):
    """Seeds the global generators by (seed, step, rank): whatever a network draws is the same after a resume."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        torch.manual_seed(named_seed(self._seed, f"rank {trainer.global_rank}", batch_idx))


class Rows(StepBoundary):
    """Logs mean losses, learning rate and speed every few steps; refuses to go on from a loss that is not finite."""

    def __init__(self, context: StageContext, settings: TrainerSettings) -> None:
        self._context = context
        self._every_steps = settings.log_every_steps
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._samples_per_s = 0.0
        self._last: tuple[float, int] | None = None

    def on_micro_batch(self, outputs: Mapping[str, Tensor]) -> None:
        """Add up the losses since the last row."""
        for name, value in outputs.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Log a row when it is due."""
        self._context.progress.update(phase=Phase.WORKING, samples_seen=module.samples_seen, activity="")
        if trainer.global_step % self._every_steps and trainer.global_step != trainer.max_steps:
            return
        means = {
            name: float(trainer.strategy.reduce(total / self._counts[name], reduce_op="mean"))
            for name, total in self._sums.items()
        }
        self._sums, self._counts = {}, Counter()
        if not math.isfinite(means[LOSS]):
            raise UserError(
                f"stage {self._context.frozen.stage}: the loss is {means[LOSS]} at {module.samples_seen} samples; "
                f"lower stage.{self._context.frozen.stage}.optimizer.learning_rate or set gradient_clip_norm"
            )
        self._measure_speed(module.samples_seen)
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = {f"train/{name}": value for name, value in means.items()}
        self._context.tracker.log(
            module.samples_seen, row | {"learning_rate": learning_rate, "samples_per_s": self._samples_per_s}
        )
        self._context.progress.update(loss=means[LOSS], samples_per_s=self._samples_per_s)

    def _measure_speed(self, samples_seen: int) -> None:
        now = time.monotonic()
        if self._last is not None:
            rate = (samples_seen - self._last[1]) / max(1e-9, now - self._last[0])
            smoothed = RATE_SMOOTHING * self._samples_per_s + (1 - RATE_SMOOTHING) * rate
            self._samples_per_s = smoothed if self._samples_per_s else rate
        self._last = (now, samples_seen)


class Validation(StepBoundary):
    """Validates with the averaged weights, at intervals of `validate_every_samples` and at the end.

    Every process goes over the same samples, so that nothing has to be reduced and no figure depends on their number.
    """

    def __init__(self, context: StageContext, images: CaptionedImages) -> None:
        self._context = context
        self._images = images
        self.latest: dict[str, float] = {}

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Validate when it is due."""
        settings = self._context.frozen.trainer
        batch = module.stage_settings.global_batch_size
        is_last = trainer.global_step == trainer.max_steps
        if not is_last and not crosses(settings.validate_every_samples, module.samples_seen, batch):
            return
        self._context.progress.update(activity="validating")
        loader = evaluation_loader(
            self._images, split=Split.VALIDATION, batch_size=batch, limit=settings.validation_samples
        )
        with module.averaged(), trainer.precision_plugin.val_step_context():
            self.latest = module.validation_metrics(each.to(module.device) for each in loader)
        row = {f"validation/{name}": value for name, value in self.latest.items()}
        self._context.tracker.log(module.samples_seen, row)

    def state_dict(self) -> dict[str, Any]:
        """The last metrics, so that a run that was killed after its last step still has them."""
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last metrics back."""
        self.latest = state_dict["latest"]


class Pictures(StepBoundary):
    """Saves and logs a grid of samples at intervals of `sample_every_samples`, and at the end."""

    def __init__(self, context: StageContext, every_samples: int | None) -> None:
        self._context = context
        self._every_samples = every_samples

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Make a grid when one is due."""
        batch = module.stage_settings.global_batch_size
        is_last = trainer.global_step == trainer.max_steps
        if not is_last and not crosses(self._every_samples, module.samples_seen, batch):
            return
        if not trainer.is_global_zero:
            return
        self._context.progress.update(activity="drawing samples")
        with module.averaged():
            grid = module.sample_grid()
        if grid is None:
            return
        path = self._context.work / SAMPLES / f"samples-{module.samples_seen:012}.png"
        path.parent.mkdir(exist_ok=True)
        grid.image.save(path)
        self._context.tracker.log_picture(module.samples_seen, "samples", path, grid.captions)


class Checkpoints(StepBoundary):
    """Saves by samples, by minutes, and when asked to stop; then it stops, on all processes at the same step."""

    def __init__(self, context: StageContext, settings: TrainerSettings, elapsed_before_s: float) -> None:
        self._context = context
        self._settings = settings
        self._started = time.monotonic()
        self._elapsed_before_s = elapsed_before_s
        self._last_save = self._started

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Save when it is due, and stop when asked to."""
        settings = self._settings
        minutes = (time.monotonic() - self._last_save) / 60
        is_asked = self._context.interruption.is_set()
        is_late = minutes >= settings.checkpoint_every_min
        if trainer.world_size > 1:
            is_asked = trainer.strategy.reduce_boolean_decision(is_asked, all=False)
            is_late = trainer.strategy.broadcast(is_late)
        is_due = crosses(
            settings.checkpoint_every_samples, module.samples_seen, module.stage_settings.global_batch_size
        )
        is_last = trainer.global_step == trainer.max_steps
        if is_asked or is_late or is_due or is_last:
            self._save(trainer, module)
        if is_asked and not is_last:
            raise StageInterrupted(f"stage {self._context.frozen.stage} stopped at {module.samples_seen} samples")

    def _save(self, trainer: pl.Trainer, module: StageModule) -> None:
        elapsed_s = self._elapsed_before_s + time.monotonic() - self._started
        keep = self._settings.keep_checkpoints
        save_checkpoint(trainer, self._context.work, module.samples_seen, elapsed_s, keep)
        self._last_save = time.monotonic()


class ResumeAtSamples(pl.Callback):
    """Rewrites Lightning's count of micro-batches on resume, so that devices and micro-batches may have changed."""

    def __init__(self, steps_done: int, micro_batches_per_step: int) -> None:
        self._done = steps_done * micro_batches_per_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning's hook, called before the loops take their state from the checkpoint."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part] |= dict.fromkeys(("ready", "started", "processed", "completed"), self._done)


def crosses(every: int | None, samples_seen: int, batch: int) -> bool:
    """Whether the step that ended at `samples_seen` reached a multiple of `every`."""
    return every is not None and samples_seen // every > (samples_seen - batch) // every
