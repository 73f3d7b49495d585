"""Randomness per sample: a draw depends on the sample's seed and on the purpose, and on nothing else in its batch."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pipeline.data.mixing import hashed, uniform


class SampleDraws:
    """Draws for a batch of B samples, given their seeds (`pipeline.data.mixing.sample_seed`), int64 [B].

    Equal (seed, purpose) gives equal draws; different purposes give independent ones. No generator of torch is
    advanced. Everything is drawn on the CPU and then brought to `device`, without waiting for it. `normals` holds
    normal draws, float32 [B, ...] by purpose, that a loader made of these seeds ahead.
    """

    def __init__(
        self,
        sample_seed: Tensor,
        device: torch.device | str = "cpu",
        normals: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.sample_seed = sample_seed.cpu()
        self._device = torch.device(device)
        self._normals = normals

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), float32 [B], in steps of 2^-24."""
        drawn = torch.from_numpy(uniform(self.sample_seed.numpy(), purpose)).to(torch.float32)
        return drawn.to(self._device, non_blocking=True)

    def integer(self, purpose: str, high: int) -> Tensor:
        """Uniform in {0, ..., high - 1}, int64 [B]; `high` is at most 2^31."""
        drawn = (hashed(self.sample_seed.numpy(), purpose) >> np.uint64(33)).astype(np.int64) * high >> 31
        return torch.from_numpy(drawn).to(self._device, non_blocking=True)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, float32 [B, *shape].

        Drawn by numpy's counter-based Philox, keyed with all 64 bits of each sample's hash (torch's CPU
        generator takes 32), so that every device sees the same noise.
        """
        if purpose in self._normals:
            drawn = self._normals[purpose]
            assert drawn.shape[1:] == shape, f"{purpose} was drawn ahead in another shape: {tuple(drawn.shape[1:])}"
            return drawn.to(self._device, non_blocking=True)
        is_cuda = self._device.type == "cuda"
        noise = torch.empty((len(self.sample_seed), *shape), dtype=torch.float32, pin_memory=is_cuda)
        # One generator that is set to each key at its beginning: a new one costs as much as thousands of its numbers,
        # for it asks the system for entropy.
        philox = np.random.Philox(key=0)
        generator, start = np.random.Generator(philox), philox.state
        key = start["state"]["key"]
        for row, seed in zip(noise.numpy(), hashed(self.sample_seed.numpy(), purpose).tolist(), strict=True):
            key[0] = seed
            philox.state = start
            generator.standard_normal(dtype=np.float32, out=row)
        return noise.to(self._device, non_blocking=True)
