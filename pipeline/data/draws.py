"""Randomness per sample: a draw depends on the sample's seed and on the purpose, and on nothing else in its batch."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.mixing import hashed, uniform


class SampleDraws:
    """Draws for a batch of B samples, given their seeds (`pipeline.data.mixing.sample_seed`), int64 [B].

    Equal (seed, purpose) gives equal draws; different purposes give independent ones. No generator of torch is
    advanced. Everything is drawn on the CPU and then brought to `device`.
    """

    def __init__(self, sample_seed: Tensor, device: torch.device | str = "cpu") -> None:
        self.sample_seed = sample_seed.cpu()
        self._device = torch.device(device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), float32 [B], in steps of 2^-24."""
        return torch.from_numpy(uniform(self.sample_seed.numpy(), purpose)).to(torch.float32).to(self._device)

    def integer(self, purpose: str, high: int) -> Tensor:
        """Uniform in {0, ..., high - 1}, int64 [B]; `high` is at most 2^31."""
        drawn = (hashed(self.sample_seed.numpy(), purpose) >> np.uint64(33)).astype(np.int64) * high >> 31
        return torch.from_numpy(drawn).to(self._device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, float32 [B, *shape].

        Drawn by numpy's counter-based Philox, keyed with all 64 bits of each sample's hash (torch's CPU
        generator takes 32), so that every device sees the same noise.
        """
        is_cuda = self._device.type == "cuda"
        noise = torch.empty((len(self.sample_seed), *shape), dtype=torch.float32, pin_memory=is_cuda)
        for row, key in zip(noise.numpy(), hashed(self.sample_seed.numpy(), purpose).tolist(), strict=True):
            np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=row)
        return noise.to(self._device, non_blocking=True)
