"""torch.compile for what a stage trains and evaluates: the whole network, or each of its repeated blocks."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch._functorch import config as functorch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils.checkpoint import checkpoint

from pipeline.config import Compile, StrategyName, TrainerSettings
from pipeline.errors import UserError
from pipeline.training.callbacks import StepBoundary
from pipeline.training.module import StageModule
from pipeline.training.precision import copies_in, in_place

STEPS_THAT_COMPILE = 64
"""Steps of a process in which new shapes are compiled. A shape that first comes later is computed eagerly."""

_SHAPES_OF_A_BLOCK = 256
"""A U-Net's blocks are of one class and of as many shapes as it has places; torch would give up after 8."""

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class CompileChoice:
    """What is compiled, and why, in half a sentence."""

    kind: Compile
    reason: str


def choose_compile(settings: TrainerSettings, strategy: StrategyName, *, is_cuda: bool) -> CompileChoice:
    """The configured choice. `auto` compiles the whole network on a GPU, where it can be.

    Raises `UserError` for a choice that this machine, or the strategy, cannot have.
    """
    if settings.compile is Compile.NONE:
        return CompileChoice(Compile.NONE, "as configured")
    lacks = _what_is_lacking(strategy, is_cuda=is_cuda)
    if settings.compile is not Compile.AUTO:
        if lacks is not None:
            raise UserError(f"trainer.compile={settings.compile.value}: {lacks}; use trainer.compile=none")
        return CompileChoice(settings.compile, "as configured")
    if not is_cuda:
        return CompileChoice(Compile.NONE, "on CPUs compiling takes longer than it saves in a short training")
    if lacks is not None:
        return CompileChoice(Compile.NONE, lacks)
    return CompileChoice(Compile.NETWORK, "on a GPU")


def _what_is_lacking(strategy: StrategyName, *, is_cuda: bool) -> str | None:
    if strategy is StrategyName.ZERO3:
        return "ZeRO-3 gathers weights between a network's layers, which a compiled graph does not let it"
    if is_cuda:
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch.compile needs Triton, which is not installed or finds no driver"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler on a CPU, such as g++, and finds none"
    return None


@contextmanager
def compiled(module: StageModule, kind: Compile, cache: Path) -> Iterator[None]:
    """Compile what `module` trains, and the blocks of what it holds frozen or evaluates, as they are first called.

    The compiler's own cache is the directory `cache`, unless the environment names another. It outlives the process.
    """
    if kind is Compile.NONE:
        yield
        return
    blocks = blocks_of(module.network, module.block_classes) if kind is Compile.BLOCKS else []
    with (
        _cache_in(cache),
        torch._dynamo.config.patch(
            # Each shape is compiled as it is: the shapes of a training are few.
            automatic_dynamic_shapes=False,
            recompile_limit=_SHAPES_OF_A_BLOCK,
            accumulated_recompile_limit=8 * _SHAPES_OF_A_BLOCK,
        ),
        # Buffers that a backward pass would work in are lost to a second one, by which a loss's gradient is measured.
        functorch.patch(donated_buffer=False),
    ):
        for each in blocks or [module.network]:
            each.compile()
        for frozen in module.frozen_networks:
            for block in blocks_of(frozen, module.block_classes):
                # How many samples carry the CLIP loss differs from step to step.
                block.compile(dynamic=True)
        module.evaluating = partial(_evaluating, module.block_classes)
        try:
            yield
        finally:
            module.evaluating = nullcontext
            torch.compiler.set_stance("default")


@contextmanager
def _evaluating(block_classes: tuple[type[nn.Module], ...], network: nn.Module) -> Iterator[None]:
    """Compile the blocks of a network that lives for one evaluation, which the next evaluation's find compiled.

    Shapes are compiled whenever they first come, for every evaluation has the same. The number of samples is left open:
    that of a sampler, and of the last batch, is another one.
    """
    for block in blocks_of(network, block_classes):
        block.compile(dynamic=True)
    with torch.compiler.set_stance("default"):
        yield


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    before = os.environ.get(_CACHE_VARIABLE)
    # torch sets the variable itself, to a directory that the next machine does not have.
    is_torchs_own = before in (None, default_cache_dir())
    if is_torchs_own:
        os.environ[_CACHE_VARIABLE] = str(directory)
    try:
        yield
    finally:
        if is_torchs_own:
            os.environ[_CACHE_VARIABLE] = before or default_cache_dir()


class StopCompiling(StepBoundary):
    """Ends compiling after the first steps, so that no odd batch in mid-training waits for a compiler.

    `compiled` takes that back in the end.
    """

    def __init__(self) -> None:
        self._steps = 0

    def on_step(self, trainer: pl.Trainer, module: StageModule) -> None:
        """Count the steps of this process."""
        self._steps += 1
        if self._steps == STEPS_THAT_COMPILE:
            torch.compiler.set_stance("eager_on_recompile")


def checkpoint_activations(network: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
    """Have each block keep its input alone, and compute the rest again for the backward pass, to the same bits."""
    for block in blocks_of(network, block_classes):
        block.forward = partial(_checkpoint, block, block.forward)


def _checkpoint(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # A graph has the weights as its inputs, backwards too.
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, block), **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Nothing around a block's forward pass; around the second one, the weights of the first."""
    return nullcontext(), in_place(copies_in(block))


def blocks_of(network: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The blocks in a network: the modules of these classes, without those that are inside of another."""
    if isinstance(network, block_classes):
        return [network]
    return [block for child in network.children() for block in blocks_of(child, block_classes)]
