"""Pictures brought to a size, and compared."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(image: Tensor, size: int) -> Tensor:
    """Pictures float [B, 3, s, s] as float32 [B, 3, size, size] (bicubic, antialiased), as the stock pipeline does."""
    return F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def peak_signal_to_noise(image: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB of pictures float [B, 3, H, W] in [-1, 1] against their truth."""
    return float(peak_signal_to_noise_of_each(image, truth).mean())


def peak_signal_to_noise_of_each(image: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of each of the pictures float [B, 3, H, W] in [-1, 1] against its truth, float32 [B]."""
    mean_square = (image.clamp(-1, 1) - truth).float().square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4.0 / mean_square)
