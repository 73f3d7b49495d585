"""Hashes of integers, from which every draw comes: splitmix64 (Steele et al. 2014). Imports no torch."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's step and finaliser: a bijection in which each input bit flips about half of the 64 output bits."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what the algorithm means
        value = value + np.uint64(_GOLDEN_GAMMA)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST_MULTIPLIER)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND_MULTIPLIER)
    return value ^ (value >> np.uint64(31))


def sample_seed(seed: int, epoch: int | NDArray[np.int64], sample: NDArray[np.int64]) -> NDArray[np.int64]:
    """The seed of each sample's draws in an epoch, int64 of the shape of `sample`: a pure function of the three."""
    state = mix(np.full(1, seed % 2**64, np.uint64))
    state = mix(state ^ np.asarray(epoch, np.int64).astype(np.uint64))
    return mix(state ^ np.asarray(sample, np.int64).astype(np.uint64)).view(np.int64)


def purpose_key(purpose: str) -> int:
    """A 64-bit number for the name of a purpose, in [0, 2^64)."""
    return int.from_bytes(blake2b(purpose.encode(), digest_size=8, person=b"purpose").digest())


def hashed(seeds: NDArray[np.int64], purpose: str) -> NDArray[np.uint64]:
    """64 bits for the seed of each sample, from which it draws for a purpose."""
    return mix(mix(seeds.view(np.uint64) ^ np.uint64(purpose_key(purpose))))


def uniform(seeds: NDArray[np.int64], purpose: str) -> NDArray[np.float64]:
    """Uniform in [0, 1), in steps of 2^-24, for the seeds of samples."""
    return (hashed(seeds, purpose) >> np.uint64(40)).astype(np.float64) * 2.0**-24


def named_seed(seed: int, name: str, number: int = 0) -> int:
    """A seed in [0, 2^63) for something that has a name and perhaps a number, such as a stage's initial weights."""
    state = mix(np.full(1, seed % 2**64, np.uint64))
    state = mix(state ^ np.uint64(purpose_key(name)))
    return int(mix(state ^ np.uint64(number))[0] >> np.uint64(1))
