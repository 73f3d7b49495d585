"""Small collectives over the processes that train one stage. With one process, each returns what it is given."""

from typing import TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank_of_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def of_all_ranks(trainer: pl.Trainer, value: Tensor) -> Tensor:
    """Every rank's tensor [...] as one [world_size, ...]; all ranks call this."""
    gathered = trainer.strategy.all_gather(value)
    return gathered.reshape(trainer.world_size, *value.shape)


def any_of_all_ranks(trainer: pl.Trainer, *flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is set on any rank; all ranks call this."""
    if trainer.world_size == 1:
        return flags
    mine = torch.tensor(flags, dtype=torch.uint8, device=trainer.strategy.root_device)
    return tuple(bool(flag) for flag in of_all_ranks(trainer, mine).any(0).tolist())


def gather_objects(value: T) -> list[T]:
    """Every rank's small object, in the order of the ranks; all ranks call this."""
    if not distributed.is_initialized():
        return [value]
    gathered: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered  # pyright: ignore[reportReturnType]  # every place is filled
