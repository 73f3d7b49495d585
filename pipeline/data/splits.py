"""Which side of the train/validation line a sample is on: a pure function of its split key. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from pipeline.errors import UserError

MIN_VALIDATION_SAMPLES = 2
"""A picture and another one: what is measured compares them."""

_ROUND_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class Split(StrEnum):
    """`UNSEEN` holds what a source keeps out of the other two on purpose; only a source assigns it."""

    TRAIN = "train"
    VALIDATION = "validation"
    UNSEEN = "unseen"

    @property
    def code(self) -> int:
        """The number that stands for this split in a prepared data artifact (uint8)."""
        return _CODES[self]


_CODES = {Split.TRAIN: 0, Split.VALIDATION: 1, Split.UNSEEN: 2}


@dataclass(frozen=True)
class SplitCounts:
    """How many samples an epoch of training shows, and how many are held out."""

    training: int
    validation: int


def split_position(split_key: str) -> float:
    """A number in [0, 1) from the hash of a split key: below the validation fraction it is held out."""
    return int.from_bytes(blake2b(split_key.encode(), digest_size=8, person=b"split").digest()) / 2**64


def split_at(position: float, validation_fraction: float) -> Split:
    """The side of a position."""
    return Split.VALIDATION if position < validation_fraction else Split.TRAIN


def check_split_sizes(positions: Sequence[float], validation_fraction: float) -> None:
    """Raise `UserError` unless there is something to train on and something to measure on.

    `positions` are those of all samples that are not kept out of both. The message names a fraction that does.
    """
    held_out = sum(position < validation_fraction for position in positions)
    if held_out >= MIN_VALIDATION_SAMPLES and held_out < len(positions):
        return
    ordered = sorted(positions)
    what = f"data.validation_fraction={validation_fraction:g} holds out {held_out} of {len(ordered)} samples"
    fitting = _fitting_fraction(ordered)
    if fitting is None:
        raise UserError(
            f"{what}, and training needs {MIN_VALIDATION_SAMPLES} held out and one to train on; give more samples, or "
            "another data.split_key where all samples share their value of it"
        )
    raise UserError(
        f"{what}; {MIN_VALIDATION_SAMPLES} or more are needed to measure on, and one to train on: set "
        f"data.validation_fraction={fitting:g}, or give more samples"
    )


def _fitting_fraction(ordered: Sequence[float]) -> float | None:
    if len(ordered) <= MIN_VALIDATION_SAMPLES:
        return None

    def fits(fraction: float) -> bool:
        return MIN_VALIDATION_SAMPLES <= sum(position < fraction for position in ordered) < len(ordered)

    least = ordered[MIN_VALIDATION_SAMPLES - 1]
    between = (least + next((position for position in ordered if position > least), 1.0)) / 2
    candidates = (*_ROUND_FRACTIONS, *(float(f"{between:.{digits}g}") for digits in (2, 4, 8, 17)))
    return next(filter(fits, candidates), None)


def check_batches_are_distinct(samples: int, global_batch_size: int, key: str) -> None:
    """Raise `UserError` where a batch would hold a picture twice: a contrastive loss would take it for its negative.

    `samples` are those of an epoch, `key` is that of the batch size.
    """
    if samples >= 2 * global_batch_size or (samples and samples % global_batch_size == 0):
        return
    most = samples // 2
    remedy = f"set {key}={most} or less" if most > 1 else "give more pictures"
    raise UserError(
        f"{key}={global_batch_size} with {samples} training samples: a batch would hold a picture twice, as its own "
        f"negative; {remedy}"
    )
