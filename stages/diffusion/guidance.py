"""Guidance: classifier-free, and by the gradient of the CLIP similarity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from stages.diffusion.clip_loss import ImageEncoder, similarity


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


def guided(
    denoise: Callable[[Tensor, Tensor, C], Tensor], condition: C, unconditional: C | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """`denoise` (x_t, timestep, condition) under a condition, guided by what it does without; None is no guidance.

    Both are computed as one batch, of twice the samples.
    """
    if unconditional is None:
        return lambda x_t, timestep: denoise(x_t, timestep, condition)
    both = type(condition).stacked([unconditional, condition])

    def guided_denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        without, conditional = denoise(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), both).chunk(2)
        return classifier_free(without, conditional, scale)

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
