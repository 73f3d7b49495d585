"""Steps whose gradient is not finite: they are skipped, and then said, or end the stage.

The optimiser skips them by itself, without asking the device. This looks when a row is written or a checkpoint saved,
so that no step waits.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from pipeline.config import NonFinite, TrainerSettings
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.errors import UserError
from pipeline.training.callbacks import StepBoundary, is_row_due
from pipeline.training.context import StageContext
from pipeline.training.module import StageModule
from pipeline.training.ranks import gather_objects, of_all_ranks

RECORD = "non_finite.jsonl"
MAX_SKIPPED_IN_A_ROW = 20
_SHOWN_KEYS = 4


@dataclass(frozen=True, eq=False)
class _Step:
    """A step that was not looked at yet: where training stood, its samples, and the numbers to look at."""

    samples_seen: int
    samples: list[Tensor]
    gradient_norm: Tensor
    are_losses_finite: Tensor


@dataclass(frozen=True)
class _Broken:
    """A step whose gradient was not finite, and the keys of its samples on all ranks."""

    samples_seen: int
    gradient_norm: str
    keys: list[str]


class NonFiniteGuard(StepBoundary):
    """Notes every step before the optimiser takes it. All ranks see the same gradient, and decide alike."""

    def __init__(
        self, context: StageContext, settings: TrainerSettings, images: CaptionedImages, policy: NonFinite
    ) -> None:
        self._context = context
        self._settings = settings
        self._images = images
        self._policy = policy
        self._samples: list[Tensor] = []
        self._steps: list[_Step] = []
        self._skipped_in_a_row = 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the samples of the step."""
        assert isinstance(batch, ImageBatch)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._samples = []
        self._samples.append(batch.sample)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradient of the whole step, before it is clipped."""
        assert isinstance(pl_module, StageModule)
        gradient_norm = pl_module.measure_gradient()
        are_losses_finite = torch.isfinite(pl_module.take_step_losses()).all()
        self._steps.append(_Step(pl_module.samples_seen, self._samples, gradient_norm, are_losses_finite))

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Look before a row is written."""
        if is_row_due(trainer, self._settings):
            self.look(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look before a checkpoint is written: whoever resumes from it knows nothing of these steps."""
        self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """Record the broken ones of the steps since the last look; all ranks call this.

        Raises `UserError` if the policy is to stop, or if too many in a row were broken.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        gradient_norms = torch.stack([step.gradient_norm for step in steps]).tolist()
        if all(map(math.isfinite, gradient_norms)):
            self._skipped_in_a_row = 0
            return
        own = torch.stack([step.are_losses_finite for step in steps])
        are_losses_finite = of_all_ranks(trainer, own).all(0).tolist()
        for step, norm, is_loss_finite in zip(steps, gradient_norms, are_losses_finite, strict=True):
            is_finite = math.isfinite(norm)
            self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
            is_overflow = getattr(trainer.precision_plugin, "scaler", None) is not None and is_loss_finite
            # A gradient scaler skips a step that overflows, and scales less from then on.
            if not is_finite and not (is_overflow and self._skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW):
                self._judge(_Broken(step.samples_seen, str(norm), self._keys(step)))

    def _judge(self, broken: _Broken) -> None:
        self._record(broken)
        if self._policy is NonFinite.STOP or self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise UserError(self._message(broken))

    def _keys(self, step: _Step) -> list[str]:
        index = self._images.data.index
        own = [index.key(row) for samples in step.samples for row in samples.tolist()]
        return [key for of_rank in gather_objects(own) for key in of_rank]

    def _record(self, broken: _Broken) -> None:
        if self._context.is_first_process and not self._context.is_lost:
            with (self._context.work / RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(broken)) + "\n")

    def _message(self, broken: _Broken) -> str:
        stage, keys = self._context.frozen.stage, broken.keys
        rest = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        remedy = (
            f"lower stage.{stage}.optimizer.learning_rate, or set stage.{stage}.optimizer.non_finite=skip"
            if self._policy is NonFinite.STOP
            else f"these were {self._skipped_in_a_row} such steps in a row: lower stage.{stage}.optimizer.learning_rate"
        )
        return (
            f"stage {stage}: the gradient is not finite after {broken.samples_seen} samples, in a step of the samples "
            f"{', '.join(keys[:_SHOWN_KEYS])}{rest} (all in {self._context.work / RECORD}); {remedy}"
        )
