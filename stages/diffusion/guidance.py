"""Guidance: classifier-free, and by the gradient of the CLIP similarity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from stages.diffusion.clip_loss import ImageEncoder, similarity
from stages.diffusion.settings import SamplerSettings


class Stackable(Protocol):
    """What a batch of samples is made from."""

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """The conditions of all parts, one part after the other."""
        ...


C = TypeVar("C", bound=Stackable)


def classifier_free(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale (conditional - unconditional); scale 1 is no guidance (arXiv 2207.12598, eq. 6)."""
    return unconditional + scale * (conditional - unconditional)


class ClassifierFree:
    """Classifier-free guidance as a sampler's settings have it, on a schedule of T timesteps."""

    def __init__(self, sampler: SamplerSettings, timesteps: int) -> None:
        self._scale = sampler.guidance_scale
        self._rescale = sampler.guidance_rescale
        low, high = sampler.guidance_interval
        self._is_everywhere = (low, high) == (0.0, 1.0)
        self._lowest, self._highest = math.floor(low * timesteps), math.floor(high * timesteps)

    @property
    def acts(self) -> bool:
        """Whether it ever changes a prediction."""
        return self._scale != 1.0

    def acts_at(self, timestep: Tensor) -> bool:
        """Whether it changes predictions at a timestep that all samples share, int64 [B]."""
        return self._is_everywhere or self._lowest <= int(timestep[0]) < self._highest

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction [B, ...]; where that is asked for, its deviation is moved towards the conditional one's
        (arXiv 2305.08891, eq. 15 and 16)."""
        prediction = classifier_free(unconditional, conditional, self._scale)
        if self._rescale == 0.0:
            return prediction
        over = tuple(range(1, prediction.ndim))
        rescaled = prediction * (conditional.std(over, keepdim=True) / prediction.std(over, keepdim=True))
        return self._rescale * rescaled + (1.0 - self._rescale) * prediction


def guided(
    denoise: Callable[[Tensor, Tensor, C], Tensor], condition: C, unconditional: C | None, guidance: ClassifierFree
) -> Callable[[Tensor, Tensor], Tensor]:
    """`denoise` (x_t, timestep, condition) under a condition, guided by what it does without; None is no guidance.

    Both are computed as one batch, of twice the samples.
    """
    if unconditional is None:
        return lambda x_t, timestep: denoise(x_t, timestep, condition)
    both = type(condition).stacked([unconditional, condition])

    def guided_denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        if not guidance.acts_at(timestep):
            return denoise(x_t, timestep, condition)
        without, conditional = denoise(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both).chunk(2)
        return guidance.combine(without, conditional)

    return guided_denoise


@dataclass(frozen=True)
class ClipGuidance:
    """Moves x0_hat along the gradient of its similarity to the caption.

    Classifier guidance (arXiv 2105.05233, algorithm 2) with log p(c | x_t) = scale w(t) sim(x0_hat, c) shifts the
    noise, eps_hat = eps - sqrt(1 - alpha_bar_t) grad_{x_t} log p, which in terms of x0_hat is a shift by
    (1 - alpha_bar_t) / sqrt(alpha_bar_t) grad_{x_t} log p. As in the CLIP loss, w(t) = alpha_bar_t: x0_hat means little
    at high noise; with it the shift is bounded at every timestep, for every prediction type. The gradient goes
    through the denoiser, which costs three times an unguided step. `text_embed` is [B, E].
    """

    clip: ImageEncoder
    text_embed: Tensor
    scale: float

    def __call__(self, predict_x_0: Callable[[Tensor], Tensor], x_t: Tensor, alpha_bar: float) -> Tensor:
        """The guided x0_hat [B, 3, S, S] at x_t [B, 3, S, S], without gradient; `predict_x_0` maps x_t to x0_hat."""
        with torch.enable_grad():
            variable = x_t.detach().requires_grad_()
            x_0 = predict_x_0(variable)
            (gradient,) = torch.autograd.grad(similarity(self.clip, x_0, self.text_embed).sum(), variable)
        # (1 - alpha_bar) / sqrt(alpha_bar) times w = alpha_bar
        return x_0.detach() + self.scale * (1.0 - alpha_bar) * alpha_bar**0.5 * gradient
