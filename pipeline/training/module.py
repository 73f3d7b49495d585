"""What the training stages share: one Lightning module around a network, its losses and its pictures."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from pipeline.config import TrainingStageSettings
from pipeline.data.batch import ImageBatch
from pipeline.training.optimizer import AdamWithEma, build_optimizer, learning_rate_factor
from pipeline.workflow.picture_grid import GridLayout

LOSS = "loss"


@dataclass(frozen=True)
class SampleGrid:
    """A picture of what the network makes now, the captions that it was asked for, and what is where in it."""

    image: Image.Image
    captions: tuple[str, ...]
    layout: GridLayout | None = None


class StageModule(pl.LightningModule, ABC):
    """Trains `network`. Frozen networks go into `frozen_networks`, so that no checkpoint holds them.

    `needs_whole_share` is for losses over the whole batch: `losses` is then given a device's share of it in one piece,
    and holds no more than `micro_batch_size` samples' activations by itself. Else the share comes in such pieces.
    """

    needs_whole_share = False

    def __init__(
        self, network: nn.Module, settings: TrainingStageSettings, frozen_networks: tuple[nn.Module, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.stage_settings = settings
        # A tuple hides them from nn.Module: no parameters of this module, no entries in its state dict.
        self.frozen_networks = frozen_networks
        for frozen in frozen_networks:
            frozen.requires_grad_(False).eval()
        self.micro_batch_size = settings.global_batch_size
        self.gradient_norm = torch.zeros(())
        self.step_was_skipped = False
        self.step_losses: list[Tensor] = []

    @abstractmethod
    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """Scalars of one batch: `loss`, which is minimised, and whatever else is worth a curve."""

    def sample_grid(self) -> SampleGrid | None:
        """A picture of the present state, made with the averaged weights; None where there is nothing to show."""
        return None

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Metrics of the validation split, which comes in batches on this device: each loss's mean over the samples."""
        sums: dict[str, float] = {}
        samples = 0
        for batch in batches:
            samples += len(batch)
            for name, value in self.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        return {name: total / samples for name, total in sums.items()}

    @property
    def samples_seen(self) -> int:
        """The progress counter."""
        return self.global_step * self.stage_settings.global_batch_size

    @property
    def ema_optimizer(self) -> AdamWithEma:
        """The optimiser, whose state holds the averaged weights."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, AdamWithEma)
        return optimizer

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate with the averaged weights, without gradients, and with this module as it was afterwards."""
        was_training = self.training
        self.eval()
        with torch.no_grad(), self.ema_optimizer.averaged_weights():
            yield
        self.train(was_training)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with averaged weights, and the learning rate on the axis of samples."""
        settings = self.stage_settings
        optimizer = build_optimizer(self.network, settings.optimizer)

        def factor(step: int) -> float:
            return learning_rate_factor(settings.optimizer, step * settings.global_batch_size, settings.max_samples)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def measure_gradient(self, optimizer: Optimizer) -> None:
        """Set `gradient_norm`, the norm of the whole gradient, float []."""
        gradients = [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]
        self.gradient_norm = get_total_norm(gradients)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's hook: clip by the norm that was measured already."""
        if gradient_clip_val is not None:
            clip_grads_with_norm_(_parameters(optimizer), float(gradient_clip_val), self.gradient_norm)

    def on_fit_start(self) -> None:
        """Bring the frozen networks to the device; Lightning does not know of them."""
        for frozen in self.frozen_networks:
            frozen.to(self.device)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """The losses of a micro-batch."""
        losses = dict(self.losses(batch))
        self.step_losses.append(losses[LOSS].detach())
        return losses


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
