"""FLOPs and memory of a step, counted on networks without weights: no step is computed."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.config import Precision
from pipeline.data.batch import ImageBatch
from pipeline.training.module import LOSS, StageModule

_ATEN = torch.ops.aten
# torch counts attention by its kernels for GPUs, and networks without weights are told that they are on a CPU. The
# number is that of the tensors from which the formula counts: query, key and value, behind them the gradient.
_ON_A_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (_ATEN._scaled_dot_product_flash_attention, 3),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward,
        4,
    ),
}
_NORMS = ("group_norm", "layer_norm")


@dataclass(frozen=True)
class Count:
    """Of one forward pass, and of the backward pass where there is one, over `samples` at once.

    `activation_bytes` is the most that is held at a time besides weights, gradients and the optimiser's state,
    `held_bytes` the same with the gradients, which are complete when the activations are gone.
    """

    samples: int
    flops: int
    activation_bytes: int
    held_bytes: int


class _Meter(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas, and follows the storages that operators make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._alive: dict[int, int] = {}
        self._changes: list[tuple[int, int]] = []

    def ignore(self, tensor: Tensor) -> None:
        """Count a tensor that was there before as nothing."""
        self._alive[tensor.untyped_storage()._cdata] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        packet, count = func._overloadpacket, len(args)
        if packet in _ON_A_CPU:
            packet, count = _ON_A_CPU[packet]
            kwargs = {}
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args[:count], **kwargs, out_val=made)
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._follow(each)
        return made

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        number, size, place = len(self._changes), storage.nbytes(), storage._cdata
        self._alive[place] = number
        self._changes.append((number, size))

        def freed() -> None:
            if self._alive.get(place) == number:
                del self._alive[place]
                self._changes.append((number, -size))

        weakref.finalize(storage, freed)

    def peak(self, without: set[int] = frozenset()) -> int:  # pyright: ignore[reportArgumentType]
        """The most bytes that were there at a time, but for the storages `without`."""
        held = most = 0
        for number, size in self._changes:
            if number not in without:
                held += size
                most = max(most, held)
        return most

    def numbers_of(self, tensors: list[Tensor]) -> set[int]:
        """What stands for tensors in `peak`."""
        return {self._alive.get(each.untyped_storage()._cdata, -1) for each in tensors}


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """What autocast does to normalisation on a GPU and not on a CPU; also where it is computed again, backwards."""
    plain = {name: getattr(F, name) for name in _NORMS}
    for name, norm in plain.items():
        setattr(F, name, partial(_in_float32, norm))
    try:
        yield
    finally:
        for name, norm in plain.items():
            setattr(F, name, norm)


def _in_float32(norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        args = tuple(each.float() if isinstance(each, Tensor) else each for each in args)
        kwargs = {name: each.float() if isinstance(each, Tensor) else each for name, each in kwargs.items()}
    return norm(*args, **kwargs)


def lightning(precision: Precision, accelerator: str = "cpu") -> pl.Trainer:
    """A Trainer for a module that is tried outside of `fit`: one process, that precision, and nothing besides."""
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision.of_lightning,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def count_training(module: StageModule, batch: ImageBatch, precision: Precision) -> Count:
    """Count a training step of a module without weights, on a GPU. Its gradients are dropped."""
    module.trainer = lightning(_counted(precision))
    module.train()

    def step() -> None:
        module.training_step(batch, 0)[LOSS].backward()
        module.step_losses.clear()

    trained = [each for each in module.network.parameters() if each.requires_grad]
    meter = _measure(step, [module, *module.frozen_networks])
    gradients = meter.numbers_of([each.grad for each in trained if each.grad is not None])
    return Count(len(batch), meter.flops, meter.peak(gradients), meter.peak())


def count_pass(forward: Callable[[ImageBatch], object], batch: ImageBatch) -> Count:
    """Count a pass without gradients, in float32."""

    def step() -> None:
        with torch.no_grad():
            forward(batch)

    meter = _measure(step, [])
    return Count(len(batch), meter.flops, meter.peak(), meter.peak())


def _counted(precision: Precision) -> Precision:
    """A precision of the same size that a CPU knows."""
    return Precision.BFLOAT16_MIXED if precision is Precision.FLOAT16_MIXED else precision


def _measure(step: Callable[[], None], modules: list[Any]) -> _Meter:
    meter = _Meter()
    for module in modules:
        for each in (*module.parameters(), *module.buffers()):
            meter.ignore(each)
    with _norms_in_float32(), meter:
        step()
    return meter
