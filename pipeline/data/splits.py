"""Which side of the train/validation line a sample is on: a pure function of its split key. Imports no torch."""

from enum import StrEnum
from hashlib import blake2b


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


def split_of(split_key: str, validation_fraction: float) -> Split:
    """Put a sample on a side by the hash of its split key.

    Neither the other samples nor the number of ranks matter; a larger fraction only moves samples from train to
    validation.
    """
    position = int.from_bytes(blake2b(split_key.encode(), digest_size=8, person=b"split").digest()) / 2**64
    return Split.VALIDATION if position < validation_fraction else Split.TRAIN
