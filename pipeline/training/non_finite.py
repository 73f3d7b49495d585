"""Steps whose gradient is not finite: stop, or skip them, and say which samples they had."""

import json
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from pipeline.config import NonFinite
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.errors import UserError
from pipeline.training.context import StageContext
from pipeline.training.module import StageModule
from pipeline.training.ranks import any_of_all_ranks, gather_objects

RECORD = "non_finite.jsonl"
MAX_SKIPPED_IN_A_ROW = 20
_SHOWN_KEYS = 4


class NonFiniteGuard(pl.Callback):
    """Looks at the gradient before every optimiser step. All ranks see the same one, and decide alike."""

    def __init__(self, context: StageContext, images: CaptionedImages, policy: NonFinite) -> None:
        self._context = context
        self._images = images
        self._policy = policy
        self._samples: list[Tensor] = []
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
        """Look at the gradient of the whole step, before it is clipped."""
        assert isinstance(pl_module, StageModule)
        pl_module.measure_gradient()
        losses = pl_module.take_step_losses()
        adamw = pl_module.strategy.adamw
        adamw.skips_steps = False
        if not pl_module.step_was_skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        (is_loss_broken,) = any_of_all_ranks(trainer, not bool(torch.isfinite(losses).all()))
        is_overflow = getattr(trainer.precision_plugin, "scaler", None) is not None and not is_loss_broken
        if is_overflow and self._skipped_in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return  # the gradient scaler skips the step, and scales less from now on
        keys = self._record(pl_module)
        if self._policy is NonFinite.STOP or self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise UserError(self._message(pl_module, keys))
        adamw.skips_steps = True

    def _record(self, module: StageModule) -> list[str]:
        index = self._images.data.index
        own = [index.key(row) for samples in self._samples for row in samples.tolist()]
        keys = [key for of_rank in gather_objects(own) for key in of_rank]
        if self._context.is_first_process and not self._context.is_lost:
            row = {"samples_seen": module.samples_seen, "gradient_norm": str(float(module.gradient_norm)), "keys": keys}
            with (self._context.work / RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return keys

    def _message(self, module: StageModule, keys: list[str]) -> str:
        stage = self._context.frozen.stage
        rest = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        remedy = (
            f"lower stage.{stage}.optimizer.learning_rate, or set stage.{stage}.optimizer.non_finite=skip"
            if self._policy is NonFinite.STOP
            else f"these were {self._skipped_in_a_row} such steps in a row: lower stage.{stage}.optimizer.learning_rate"
        )
        return (
            f"stage {stage}: the gradient is not finite after {module.samples_seen} samples, in a step of the samples "
            f"{', '.join(keys[:_SHOWN_KEYS])}{rest} (all in {self._context.work / RECORD}); {remedy}"
        )
