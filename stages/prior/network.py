"""The diffusion prior: diffusers' `PriorTransformer` on whitened image embeddings."""

from dataclasses import dataclass

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from stages.settings import PriorNetworkSettings

_MIN_STD = 1e-6
"""Floor of a dimension's standard deviation: a constant one whitens to 0."""


@dataclass(frozen=True)
class Whitening:
    """Mean and standard deviation of every dimension of the image embeddings, float [E] each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, embeds: Tensor) -> "Whitening":
        """The statistics of embeddings float [N, E]."""
        return cls(mean=embeds.mean(0), std=embeds.std(0, correction=0).clamp(min=_MIN_STD))

    def whiten(self, embed: Tensor) -> Tensor:
        """Embeddings [..., E] as CLIP's projection gives them -> zero mean and unit variance in every dimension."""
        return (embed - self.mean.to(embed)) / self.std.to(embed)

    def unwhiten(self, embed: Tensor) -> Tensor:
        """The inverse of `whiten`, [..., E]."""
        return embed * self.std.to(embed) + self.mean.to(embed)


def build_prior(network: PriorNetworkSettings, embed_dim: int, context_length: int) -> PriorTransformer:
    """A prior over embeddings of width `embed_dim`, conditioned on `context_length` token states of the same width.

    Call it as `denoise_prior` does. `clip_mean` and `clip_std`, which diffusers declares as parameters, have no
    gradient; `set_whitening` fills them.
    """
    prior = PriorTransformer(
        num_attention_heads=network.heads,
        attention_head_dim=network.head_dim,
        num_layers=network.layers,
        embedding_dim=embed_dim,
        num_embeddings=context_length,
    )
    prior.clip_mean.requires_grad_(False)
    prior.clip_std.requires_grad_(False)
    return prior


@torch.no_grad()
def set_whitening(prior: PriorTransformer, whitening: Whitening) -> None:
    """Store the statistics in the prior, from where diffusers' `post_process_latents` takes them."""
    prior.clip_mean.copy_(whitening.mean[None])
    prior.clip_std.copy_(whitening.std[None])


def get_whitening(prior: PriorTransformer) -> Whitening:
    """The statistics that `set_whitening` stored."""
    return Whitening(mean=prior.clip_mean.detach()[0].clone(), std=prior.clip_std.detach()[0].clone())


def denoise_prior(
    prior: PriorTransformer, noisy: Tensor, timestep: Tensor, text_embed: Tensor, text_hidden: Tensor, text_mask: Tensor
) -> Tensor:
    """The prediction float [B, E] for noisy whitened embeddings float [B, E] at timestep int64 [B].

    `text_embed` [B, E], `text_hidden` [B, L, E] and `text_mask` bool [B, L] are the caption's `TextEncoding`. A dropped
    caption is the encoding of "".
    """
    return prior(
        noisy,
        timestep=timestep,
        proj_embedding=text_embed,
        encoder_hidden_states=text_hidden,
        attention_mask=text_mask,
        return_dict=False,
    )[0]
