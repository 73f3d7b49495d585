"""L_clip: how well the predicted clean image fits its caption, in a frozen CLIP."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.diffusion.settings import ClipLossSettings


class ImageEncoder(Protocol):
    """The part of a CLIP that the loss and the guidance need."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Embeddings [B, E] of pictures [B, 3, S, S] in [-1, 1]."""
        ...


def similarity(clip: ImageEncoder, image: Tensor, text_embed: Tensor) -> Tensor:
    """sim(image, caption), the cosine in CLIP's space: float32 [B] in [-1, 1], differentiable in `image`.

    `image` [B, 3, S, S] is clamped to [-1, 1] first: the frozen CLIP saw nothing beyond, and a gradient that goes there
    would buy similarity with colours that no screen shows.
    """
    image_embed = clip.encode_image(image.float().clamp(-1.0, 1.0))
    return F.cosine_similarity(image_embed.float(), text_embed.float(), dim=-1)


def clip_loss(
    clip: ImageEncoder, x_0_hat: Tensor, text_embed: Tensor, alpha_bar: Tensor, draw: Tensor, settings: ClipLossSettings
) -> Tensor:
    """-w(t) sim(x0_hat, caption) of each sample, float32 [B], without lambda; w(t) = alpha_bar_t ** timestep_power.

    `x_0_hat` [B, 3, S, S], `text_embed` [B, E], `alpha_bar` [B]. A sample carries the loss where its `draw` [B],
    uniform in [0, 1) and on the CPU, is below `sample_share`; it is then divided by the share and is 0 elsewhere, so
    that the mean over any batch estimates the same expectation however the batch is split over devices. `clip` must be
    frozen and in eval mode.
    """
    weight = alpha_bar.float() ** settings.timestep_power / settings.sample_share
    if settings.sample_share >= 1.0:
        return -weight * similarity(clip, x_0_hat, text_embed)
    # Found on the CPU: a GPU would be waited for, to know how many there are.
    carrying = torch.nonzero(draw < settings.sample_share).squeeze(1).to(x_0_hat.device, non_blocking=True)
    # Keeps the graph whole on a device none of whose samples carry the loss.
    loss = 0.0 * x_0_hat.float().flatten(1).sum(1)
    if len(carrying) == 0:
        return loss
    carried = -weight[carrying] * similarity(clip, x_0_hat[carrying], text_embed[carrying])
    return loss.index_add(0, carrying, carried)


def output_gradient_norms(diffusion_loss: Tensor, clip_loss: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """L2 norms, float32 [] each, of each scalar loss's gradient with respect to the network's output.

    The graph stays for `backward`.
    """
    (diffusion_gradient,) = torch.autograd.grad(diffusion_loss, prediction, retain_graph=True)
    (clip_gradient,) = torch.autograd.grad(clip_loss, prediction, retain_graph=True)
    return diffusion_gradient.float().norm(), clip_gradient.float().norm()
