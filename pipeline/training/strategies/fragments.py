"""The part of the trained state that a process holds. Its names let any number of processes find their own parts."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from pipeline.training.optimizer import EMA, AdamWithEma

WEIGHT = "weight"
STEP = "step"
_SEPARATOR = "|"
_STATES = ("exp_avg", "exp_avg_sq", EMA)


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of a parameter's flattened form, from `start` on, which this process updates.

    The optimiser knows them as the elements from `offset` on of `holder`: the parameter itself, or a flat partition of
    many parameters.
    """

    name: str
    start: int
    numel: int
    holder: Tensor
    offset: int

    def part_of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements [numel] of a tensor that is shaped like the holder; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    def tensors(self, optimizer: AdamWithEma) -> dict[str, Tensor]:
        """Weight, moments and average, float32 [numel] each, and the number of steps, float32 [1]; {} before a step."""
        state = optimizer.state.get(self.holder, {})
        if STEP not in state:
            return {WEIGHT: self.part_of(self.holder)}
        parts = {name: self.part_of(state[name]) for name in _STATES if name in state}
        return {WEIGHT: self.part_of(self.holder), **parts, STEP: state[STEP].detach().reshape(1).float()}

    def averaged(self, optimizer: AdamWithEma) -> Tensor:
        """The averaged weights float32 [numel], or the weights where none are kept; a view."""
        return self.part_of(optimizer.state.get(self.holder, {}).get(EMA, self.holder))


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the same order on every process."""
    return {name: each for name, each in network.named_parameters() if each.requires_grad}


def gathered(
    shapes: Mapping[str, torch.Size], parts: Iterable[tuple[str, int, Tensor]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters, one after the other, on every process. All processes call this and iterate to its end.

    `parts` are this process's own: (name, start, float32 [n]). No element is in the parts of two processes.
    """
    own: dict[str, list[tuple[int, Tensor]]] = {}
    for name, start, tensor in parts:
        own.setdefault(name, []).append((start, tensor))
    for name, shape in shapes.items():
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
        for start, tensor in own.get(name, ()):
            whole.narrow(0, start, len(tensor)).copy_(tensor)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            # As whole numbers: adding a float to 0 would lose the sign of -0.
            distributed.all_reduce(whole.view(torch.int32))
        yield name, whole.view(shape)


def named_tensors(fragments: Iterable[Fragment], optimizer: AdamWithEma) -> list[tuple[str, Tensor]]:
    """What of fragments is in a checkpoint, float32 [n] each, by plain names: parameter|state|start."""
    return [
        (_SEPARATOR.join((fragment.name, state, str(fragment.start))), tensor)
        for fragment in fragments
        for state, tensor in fragment.tensors(optimizer).items()
    ]


def read_fragments(paths: Iterable[Path], fragments: Iterable[Fragment], optimizer: AdamWithEma) -> None:
    """Fill fragments from files, whichever strategy on however many processes wrote them. Only what is needed is read.

    Raises `KeyError` if the files do not hold all of a fragment.
    """
    with ExitStack() as stack:
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        for path in paths:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, state, start = key.split(_SEPARATOR)
                numel = file.get_slice(key).get_shape()[0]
                pieces.setdefault((name, state), []).append(_Piece(file, key, int(start), numel))
        for fragment in fragments:
            _read_fragment(fragment, pieces, optimizer)


@dataclass(frozen=True)
class _Piece:
    """Elements `start` to `start + numel` of a parameter's state, under `key` of an open file."""

    file: safe_open
    key: str
    start: int
    numel: int


def _read_fragment(fragment: Fragment, pieces: Mapping[tuple[str, str], list[_Piece]], optimizer: AdamWithEma) -> None:
    _read_into(fragment.part_of(fragment.holder), fragment, pieces[fragment.name, WEIGHT])
    steps = pieces.get((fragment.name, STEP))
    if steps is None:
        return
    state = optimizer.state[fragment.holder]
    step = steps[0].file.get_tensor(steps[0].key)
    # A copy: the tensor itself would keep the whole file mapped, and its room on disk after it is deleted.
    state[STEP] = step.reshape(()).to(fragment.holder.device, copy=True)
    for name in _STATES:
        found = pieces.get((fragment.name, name))
        if found is not None:
            if name not in state:
                state[name] = torch.zeros_like(fragment.holder.detach())
            _read_into(fragment.part_of(state[name]), fragment, found)


def _read_into(target: Tensor, fragment: Fragment, pieces: Iterable[_Piece]) -> None:
    missing = fragment.numel
    for piece in pieces:
        first = max(fragment.start, piece.start)
        last = min(fragment.start + fragment.numel, piece.start + piece.numel)
        if first < last:
            values = piece.file.get_slice(piece.key)[first - piece.start : last - piece.start]
            target.narrow(0, first - fragment.start, last - first).copy_(values)
            missing -= last - first
    if missing:
        raise KeyError(f"{missing} of {fragment.numel} elements of {fragment.name} are in no file")
