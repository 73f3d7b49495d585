"""What the training stages share: one Lightning module around a network, its losses and its pictures."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pipeline.config import TrainingStageSettings
from pipeline.data.batch import ImageBatch
from pipeline.picture_grid import GridLayout
from pipeline.training.optimizer import build_optimizer, learning_rate_factor
from pipeline.training.parameters import freeze, learning_rate_factors
from pipeline.training.precision import CastableNetwork
from pipeline.training.strategies.portable import PortableStrategy
from pipeline.training.weighted import weighted_means

LOSS = "loss"

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class SampleGrid:
    """A picture of what the network makes now, the captions that it was asked for, and what is where in it."""

    image: Image.Image
    captions: tuple[str, ...]
    layout: GridLayout | None = None


class StageModule(pl.LightningModule, ABC, Generic[Network]):
    """Trains `network`. Frozen networks go into `frozen_networks`, so that no checkpoint holds them.

    By default `losses` gets a device's share of the batch in micro-batches. Set `needs_whole_share` for a loss over the
    whole batch: `losses` then gets the share in one piece, and must itself hold the activations of at most
    `micro_batch_size` samples at a time.
    """

    needs_whole_share = False
    block_classes: tuple[type[nn.Module], ...] = ()
    """The classes of the repeated blocks that networks are made of, for `trainer.compile` and checkpointing."""
    weights_prefix = ""
    """What the names of the network's parameters begin with and those in its weights' file do not."""

    def __init__(
        self, network: Network, settings: TrainingStageSettings, frozen_networks: tuple[nn.Module, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.stage_settings = settings
        freeze(network, settings.optimizer.freeze, self.weights_prefix)
        self.learning_rate_factors = learning_rate_factors(
            network, settings.optimizer, self.layers_above, self.weights_prefix
        )
        # A tuple hides them from nn.Module: no parameters of this module, no entries in its state dict.
        self._hidden_skeleton = (_skeleton_of(network),)
        self.frozen_networks = frozen_networks
        for frozen in frozen_networks:
            frozen.requires_grad_(False).eval()
        self.micro_batch_size = settings.global_batch_size
        self.gradient_norm = torch.zeros(())
        self.step_losses: list[Tensor] = []
        self.evaluating: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
        """Around what is done with a network that holds the averaged weights."""

    def hold_at_most(self, micro_batch_size: int) -> None:
        """Compute in pieces: never hold the activations of more than `micro_batch_size` samples."""
        self.micro_batch_size = micro_batch_size

    @abstractmethod
    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        """Scalars of one batch: `loss`, which is minimised, and whatever else is worth a curve."""

    @property
    def has_sample_grid(self) -> bool:
        """Whether there is anything to show."""
        return type(self).sample_grid is not StageModule.sample_grid

    def sample_grid(self) -> SampleGrid:
        """A picture of the present state, made with the averaged weights, by stages that have anything to show."""
        raise NotImplementedError

    @property
    def has_evaluation(self) -> bool:
        """Whether there is more to measure than a validation does."""
        return type(self).evaluation_metrics is not StageModule.evaluation_metrics

    def evaluation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Metrics of what the network makes now, which cost more than those of a validation; called like them."""
        raise NotImplementedError

    def validation_metrics(self, batches: Iterable[ImageBatch]) -> dict[str, float]:
        """Metrics of the validation split, which comes in batches on this device: each loss's mean over the samples.

        The first process alone calls this. A batch has no more than `micro_batch_size` samples.
        """
        sums: dict[str, float] = {}
        samples = 0
        for batch in batches:
            samples += len(batch)
            for name, value in self.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        return weighted_means({name: total / samples for name, total in sums.items()})

    @property
    def samples_seen(self) -> int:
        """The progress counter."""
        return self.global_step * self.stage_settings.global_batch_size

    @property
    def parameter_ranges(self) -> Mapping[str, tuple[float, float]]:
        """Parameters of the network that the optimiser is to keep between two numbers, by name."""
        return {}

    @property
    def layers_above(self) -> Mapping[str, int] | None:
        """How many layers of the network follow that of each parameter; None where they have no order."""
        return None

    @property
    def strategy(self) -> PortableStrategy:
        """How the state is spread over processes."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, PortableStrategy)
        return strategy

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Evaluate with the averaged weights and without gradients. The module is as before afterwards.

        All processes enter this, since averages that are sharded have to be gathered. It yields True on the first
        process, which is the one to evaluate: its `network` then holds all averaged weights and has no hooks.
        """
        was_training = self.training
        trained, network = self.network, self._evaluation_network()
        if network is not None:
            self.network = network
        self.eval()
        try:
            with torch.no_grad(), nullcontext() if network is None else self.evaluating(network):
                yield network is not None
        finally:
            self.network = trained
            self.train(was_training)

    def _evaluation_network(self) -> Network | None:
        constants = self.strategy.constants()
        if not self.trainer.is_global_zero:
            for _ in self.strategy.averaged_parameters():
                """Gathered for the first process, one after the other."""
            return None
        network = copy.deepcopy(self._hidden_skeleton[0])
        network.load_state_dict(constants | dict(self.strategy.averaged_parameters()), strict=False, assign=True)
        return network.to(self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with averaged weights, and the learning rate on the axis of samples."""
        settings = self.stage_settings
        # The fused kernel for CPUs rounds the last few elements of a tensor otherwise than the rest, so that a weight
        # would depend on how a tensor is cut into shards.
        is_fused = self.strategy.root_device.type == "cuda" or self.trainer.world_size == 1
        optimizer = build_optimizer(
            self.network, settings.optimizer, self.parameter_ranges, self.learning_rate_factors, fused=is_fused
        )

        def factor(step: int) -> float:
            return learning_rate_factor(settings.optimizer, step * settings.global_batch_size, settings.max_samples)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def measure_gradient(self) -> Tensor:
        """The norm of the whole gradient, float [], which `gradient_norm` then has too."""
        self.gradient_norm = self.strategy.gradient_norm()
        return self.gradient_norm

    def take_step_losses(self) -> Tensor:
        """The losses of the step's micro-batches so far, float [M], which are forgotten here."""
        losses = torch.stack(self.step_losses)
        self.step_losses = []
        return losses

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that was measured already, in the optimiser's step."""
        self.strategy.prepare_step(self.gradient_norm, None if gradient_clip_val is None else float(gradient_clip_val))

    @override
    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int = 0) -> ImageBatch:
        """Queue the copies behind the work of the device, and wait for none."""
        return batch.to(device, non_blocking=True)

    def on_fit_start(self) -> None:
        """Bring the frozen networks to the device; Lightning does not know of them."""
        for frozen in self.frozen_networks:
            frozen.to(self.device)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """The losses of a micro-batch."""
        # Here, inside of whatever wraps this module: see `ZeroPrecision.train_step_context`.
        with self.trainer.precision_plugin.forward_context(), self.with_cast_weights():
            losses = dict(self.losses(batch))
        self.step_losses.append(losses[LOSS].detach())
        return losses

    @contextmanager
    def with_cast_weights(self) -> Iterator[None]:
        """Compute with bf16 copies of the weights, where training is in bf16.

        One within another makes copies of its own: what several calls of a network give of a gradient is then added up
        in float32.
        """
        with ExitStack() as stack:
            for castable in self._castables:
                stack.enter_context(castable.with_cast_weights())
            yield

    @cached_property
    def _castables(self) -> list[CastableNetwork]:
        device = self.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is not torch.bfloat16:
            return []
        # ZeRO-3 gathers a layer's weights when its turn comes.
        is_whole = getattr(self.trainer.strategy, "has_whole_weights", True)
        return [CastableNetwork(self.network, has_whole_weights=is_whole), *map(CastableNetwork, self.frozen_networks)]


def within(batches: Iterable[ImageBatch], samples: int) -> list[ImageBatch]:
    """The first batches, up to the one with which `samples` are reached."""
    found: list[ImageBatch] = []
    for batch in batches:
        if sum(map(len, found)) >= samples:
            break
        found.append(batch)
    return found


def _skeleton_of(network: Network) -> Network:
    """A copy without weights: they come by `load_state_dict`, with `assign`."""
    bare = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
        for each in network.parameters()
    }
    return copy.deepcopy(network, bare)
