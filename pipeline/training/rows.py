"""The rows of a training stage: mean losses, learning rate, gradient norm, speed, and samples that cannot be used."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.config import TrainerSettings
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages
from pipeline.data.decode import DecodeFault
from pipeline.data.faults import FaultTally, too_many_faults
from pipeline.errors import UserError
from pipeline.training.callbacks import StepBoundary, is_row_due
from pipeline.training.context import StageContext
from pipeline.training.measurements import Measurements
from pipeline.training.module import LOSS, StageModule
from pipeline.training.ranks import gather_objects, of_all_ranks
from pipeline.training.weighted import weighted_means
from pipeline.workflow.progress import Phase
from pipeline.workflow.record import MEASURED

RATE_SMOOTHING = 0.9
STATE = "rows"


class Rows(StepBoundary):
    """Logs a row every few steps. Stops at a loss that is not finite, or if too many samples cannot be used.

    The sums since the last row are part of every checkpoint.
    """

    def __init__(
        self, context: StageContext, settings: TrainerSettings, images: CaptionedImages, measurements: Measurements
    ) -> None:
        self._context = context
        self._settings = settings
        self._images = images
        self._measurements = measurements
        self._step_sums: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._steps_skipped: Tensor | int = 0
        self._tally = FaultTally()
        self._own_tally = FaultTally()
        self._samples_per_s = 0.0
        self._is_warm = False

    def on_micro_batch(self, outputs: Mapping[str, Tensor], batch: ImageBatch) -> None:
        """Add up the losses of the step, and the samples that were replaced."""
        for name, value in outputs.items():
            value = value.detach().float()
            self._step_sums[name] = self._step_sums[name] + value if name in self._step_sums else value
        self._own_tally.add(len(batch), batch.faults)

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Take the step's losses in, and log a row when it is due."""
        self._context.progress.update(phase=Phase.WORKING, samples_seen=module.samples_seen, activity="")
        self._take_step_in(trainer, module)
        if not is_row_due(trainer, self._settings):
            return
        means = self._take_means(trainer)
        stage = self._context.frozen.stage
        if not math.isfinite(means.get(LOSS, 0.0)):
            raise UserError(
                f"stage {stage}: the loss is {means[LOSS]} at {module.samples_seen} samples; "
                f"lower stage.{stage}.optimizer.learning_rate or set gradient_clip_norm"
            )
        tally = self._tally_of_all_ranks(trainer)
        system = self._measurements.take(trainer, module.samples_seen)
        row = {f"train/{name}": value for name, value in means.items()}
        row["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if steps_skipped := int(self._steps_skipped):
            row["train/steps_skipped"] = steps_skipped
        self._context.tracker.log(module.samples_seen, row | tally.metrics() | system)
        samples_per_s = self._smoothed(system[f"{MEASURED}samples_per_s"])
        self._context.progress.update(loss=means.get(LOSS), samples_per_s=samples_per_s)
        if tally.is_over(self._settings.max_faulty_share):
            by_shard: Counter[str] = Counter()
            for found in gather_objects(self._images.faulty_by_shard()):
                by_shard.update(found)
            raise too_many_faults(tally, self._settings.max_faulty_share, by_shard)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what every rank has added up since the last row. All ranks call this."""
        tally = self._tally_of_all_ranks(trainer)
        checkpoint[STATE] = {
            "sums": {name: of_all_ranks(trainer, total).flatten().cpu() for name, total in self._sums.items()},
            "counts": {name: int(count) for name, count in self._counts.items()},
            "steps_skipped": int(self._steps_skipped),
            "read": tally.read,
            "faults": dict(tally.by_reason),
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back what was added up. With another number of ranks, each takes the mean."""
        state = checkpoint[STATE]
        device = trainer.strategy.root_device
        self._counts = {name: torch.tensor(count, device=device) for name, count in state["counts"].items()}
        self._steps_skipped = state["steps_skipped"]
        self._tally, self._own_tally = FaultTally(state["read"], state["faults"]), FaultTally()
        for name, of_ranks in state["sums"].items():
            is_same_world = len(of_ranks) == trainer.world_size
            self._sums[name] = (of_ranks[trainer.global_rank] if is_same_world else of_ranks.mean()).to(device)

    def _take_step_in(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Add the step's means to the sums, unless it was skipped; which of the two, only the device knows yet."""
        sums, self._step_sums = self._step_sums, {}
        is_taken = torch.isfinite(module.gradient_norm)
        self._steps_skipped = self._steps_skipped + ~is_taken
        means = {name: total / trainer.accumulate_grad_batches for name, total in sums.items()}
        for name, value in (means | {"gradient_norm": module.gradient_norm}).items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(is_taken, value, 0.0)
            self._counts[name] = self._counts.get(name, 0) + is_taken

    def _take_means(self, trainer: pl.Trainer) -> dict[str, float]:
        """The means over the steps since the last row and over all ranks. Here the device is waited for."""
        if not self._sums:
            return {}
        names = list(self._sums)
        sums, counts = (torch.stack(list(each.values())) for each in (self._sums, self._counts))
        self._sums, self._counts = {}, {}
        means = of_all_ranks(trainer, sums / counts).mean(0).tolist()
        counted = zip(names, means, counts.tolist(), strict=True)
        return weighted_means({name: mean for name, mean, count in counted if count})

    def _tally_of_all_ranks(self, trainer: pl.Trainer) -> FaultTally:
        """The counts from before this process began, plus those of all ranks since."""
        own = [self._own_tally.read, *(self._own_tally.by_reason[fault.value] for fault in DecodeFault)]
        read, *faults = of_all_ranks(trainer, torch.tensor(own, device=trainer.strategy.root_device)).sum(0).tolist()
        found = {fault.value: count for fault, count in zip(DecodeFault, faults, strict=True) if count}
        return FaultTally(self._tally.read + read, self._tally.by_reason + Counter(found))

    def _smoothed(self, rate: float) -> float:
        """The rate from which the remaining time is told. The first row's is left out, as it contains the warm-up."""
        if self._is_warm:
            smoothed = RATE_SMOOTHING * self._samples_per_s + (1 - RATE_SMOOTHING) * rate
            self._samples_per_s = smoothed if self._samples_per_s else rate
        self._is_warm = True
        return self._samples_per_s
