"""How the low-resolution condition of an upsampler is degraded in training, so that it copes with imperfect decoders.

Every parameter comes from the sample's own draws: a sample is degraded alike in any batch, on any number of devices.
"""

import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2.functional import gaussian_blur

from pipeline.data.draws import SampleDraws
from stages.upsampler.settings import Degradation

BLUR_KERNEL = 3
BLUR_SIGMA = 0.6
"""unCLIP's first upsampler: "gaussian blur (kernel size 3, sigma 0.6)" (arXiv 2204.06125, appendix C)."""

_BSR_KERNEL = 7
_BSR_SIGMA = (0.1, 2.0)
_BSR_RESIZE = (0.5, 1.0)
_BSR_NOISE = (1.0 / 255.0, 25.0 / 255.0)
_BSR_JPEG_QUALITY = (30, 95)
_BSR_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def degrade(kind: Degradation, low: Tensor, draws: SampleDraws) -> Tensor:
    """Low-resolution pictures float32 [B, 3, s, s] in [-1, 1], degraded; same shape, type and range."""
    # Autocast is for networks: it would have the blur of the pictures round them to 8 bits.
    with torch.autocast(low.device.type, enabled=False):
        match kind:
            case Degradation.NONE:
                return low
            case Degradation.BLUR:
                return blur(low)
            case Degradation.BSR:
                return bsr(low, draws)


def blur(low: Tensor) -> Tensor:
    """The fixed Gaussian blur of unCLIP's first upsampler; [B, 3, s, s] in [-1, 1] to the same."""
    return gaussian_blur(low, [BLUR_KERNEL, BLUR_KERNEL], [BLUR_SIGMA, BLUR_SIGMA])


def bsr(low: Tensor, draws: SampleDraws) -> Tensor:
    """Blur, resizing, noise and JPEG compression of random strength, in a random order for each sample.

    After BSRGAN (arXiv 2103.14006, section 3), one pass of each, as its light variant in latent diffusion. [B, 3, s, s]
    in [-1, 1] to the same; the JPEG step runs on the CPU.
    """
    steps: tuple[Callable[[Tensor, int], Tensor], ...] = (
        _random_blur(draws),
        _random_resize(draws),
        _random_noise(low, draws),
        _random_jpeg(draws),
    )
    orders = list(itertools.permutations(steps))
    chosen = draws.integer("bsr.order", len(orders)).tolist()
    degraded: list[Tensor] = []
    for row, order in enumerate(chosen):
        picture = low[row]
        for step in orders[order]:
            picture = step(picture, row).clamp(-1.0, 1.0)
        degraded.append(picture)
    return torch.stack(degraded)


def _between(draws: SampleDraws, purpose: str, bounds: tuple[float, float]) -> list[float]:
    low, high = bounds
    return (low + (high - low) * draws.uniform(purpose)).tolist()


def _random_blur(draws: SampleDraws) -> Callable[[Tensor, int], Tensor]:
    """An anisotropic Gaussian: a standard deviation along each of two axes at a random angle."""
    first = _between(draws, "bsr.blur.first_sigma", _BSR_SIGMA)
    second = _between(draws, "bsr.blur.second_sigma", _BSR_SIGMA)
    angle = _between(draws, "bsr.blur.angle", (0.0, math.pi))

    def step(picture: Tensor, row: int) -> Tensor:
        kernel = _gaussian_kernel(first[row], second[row], angle[row]).to(picture)
        margin = _BSR_KERNEL // 2
        padded = F.pad(picture[:, None], (margin, margin, margin, margin), mode="replicate")
        return F.conv2d(padded, kernel[None, None])[:, 0]

    return step


def _gaussian_kernel(first_sigma: float, second_sigma: float, angle: float) -> Tensor:
    """Float32 [7, 7] that sums to 1."""
    axis = torch.arange(_BSR_KERNEL, dtype=torch.float32) - _BSR_KERNEL // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    kernel = torch.exp(-0.5 * ((along / first_sigma) ** 2 + (across / second_sigma) ** 2))
    return kernel / kernel.sum()


def _random_resize(draws: SampleDraws) -> Callable[[Tensor, int], Tensor]:
    """Shrunk and enlarged again, each way by a random interpolation."""
    share = _between(draws, "bsr.resize.share", _BSR_RESIZE)
    down = draws.integer("bsr.resize.down", len(_BSR_INTERPOLATIONS)).tolist()
    up = draws.integer("bsr.resize.up", len(_BSR_INTERPOLATIONS)).tolist()

    def step(picture: Tensor, row: int) -> Tensor:
        size = picture.shape[-1]
        smaller = max(1, round(size * share[row]))
        shrunk = F.interpolate(picture[None], size=(smaller, smaller), mode=_BSR_INTERPOLATIONS[down[row]])
        return F.interpolate(shrunk, size=(size, size), mode=_BSR_INTERPOLATIONS[up[row]])[0]

    return step


def _random_noise(low: Tensor, draws: SampleDraws) -> Callable[[Tensor, int], Tensor]:
    """Gaussian noise; levels are given for pictures in [0, 1], hence the factor of 2."""
    level = _between(draws, "bsr.noise.level", _BSR_NOISE)
    noise = draws.normal("bsr.noise", tuple(low.shape[1:]))

    def step(picture: Tensor, row: int) -> Tensor:
        return picture + 2.0 * level[row] * noise[row].to(picture)

    return step


def _random_jpeg(draws: SampleDraws) -> Callable[[Tensor, int], Tensor]:
    lowest, highest = _BSR_JPEG_QUALITY
    quality = (lowest + draws.integer("bsr.jpeg.quality", highest - lowest + 1)).tolist()

    def step(picture: Tensor, row: int) -> Tensor:
        pixels = ((picture + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        encoded = cast(Tensor, encode_jpeg(pixels, quality=quality[row]))
        decoded = cast(Tensor, decode_jpeg(encoded, mode=ImageReadMode.RGB))
        return decoded.to(picture) / 127.5 - 1.0

    return step
