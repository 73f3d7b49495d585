"""How a global batch is shared by devices and cut into micro-batches. Imports no torch, so planning can refuse one."""

from dataclasses import dataclass

from pipeline.config import TrainerSettings
from pipeline.errors import UserError


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut: `micro_batch_size` samples at once on each device, `accumulation` times per step."""

    micro_batch_size: int
    accumulation: int


def shape_of_batch(global_batch_size: int, settings: TrainerSettings) -> BatchShape:
    """The largest micro-batch that divides a device's share and does not exceed the allowed size."""
    share = global_batch_size // settings.world_size
    micro_batch_size = largest_piece(share, settings.micro_batch_size)
    return BatchShape(micro_batch_size, share // micro_batch_size)


def largest_piece(share: int, limit: int | None) -> int:
    """The largest number of samples that divides a device's share of the batch and is at most `limit`."""
    return next(size for size in range(min(share, limit or share), 0, -1) if share % size == 0)


def check_batch(global_batch_size: int, trainer: TrainerSettings, path: str) -> None:
    """Refuse a global batch that the devices cannot share, or that micro-batches of the allowed size hardly make."""
    devices, limit = trainer.world_size, trainer.micro_batch_size
    if global_batch_size % devices:
        raise UserError(
            f"{path}.global_batch_size={global_batch_size} is not divisible by {devices} devices; "
            f"use {nearest_multiples(global_batch_size, devices)}"
        )
    share = global_batch_size // devices
    if limit is None or 2 * largest_piece(share, limit) > min(share, limit):
        return
    larger = next(size for size in range(limit, share + 1) if share % size == 0)
    raise UserError(
        f"{path}.global_batch_size={global_batch_size} on {devices} devices is {share} samples each, of which "
        f"micro_batch_size={limit} makes pieces of {largest_piece(share, limit)}; use micro_batch_size={larger}, or a "
        f"global_batch_size of {nearest_multiples(global_batch_size, devices * limit)}"
    )


def nearest_multiples(value: int, divisor: int) -> str:
    """For a message: the multiples of `divisor` on both sides of a value."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
