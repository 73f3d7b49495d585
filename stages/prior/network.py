"""The diffusion prior: diffusers' `PriorTransformer` on whitened image embeddings."""

from pathlib import Path

import torch
from diffusers.models.transformers.prior_transformer import PriorTransformer
from torch import Tensor

from pipeline.workflow.artifacts import Artifact
from stages.clip.network import TextEncoding
from stages.clip.settings import ClipNumbers, require_same_clip
from stages.embed.embeddings import Whitening
from stages.initial import folder_weights
from stages.prior.settings import PriorNetworkSettings, PriorSettings, prior_folder
from stages.weights import CPU, load_weights


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


def read_prior_folder(prior: PriorTransformer, folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder's prior, for `prior`."""
    return folder_weights(prior_folder(folder, str(folder)), prior)


def load_prior(artifact: Artifact, clip: Artifact, device: torch.device = CPU) -> PriorTransformer:
    """The prior of an artifact, with the statistics of its embeddings in it."""
    require_same_clip(artifact, clip)
    sizes = clip.numbers(ClipNumbers)
    network = artifact.settings(PriorSettings).network
    return load_weights(lambda: build_prior(network, sizes.embed_dim, sizes.context_length), artifact, device)


def denoise_prior(prior: PriorTransformer, noisy: Tensor, timestep: Tensor, text: TextEncoding) -> Tensor:
    """The prediction float [B, E] for noisy whitened embeddings float [B, E] at timestep int64 [B].

    A dropped caption is the encoding of "".
    """
    return prior(
        noisy,
        timestep=timestep,
        proj_embedding=text.embed,
        encoder_hidden_states=text.hidden,
        attention_mask=text.mask,
        return_dict=False,
    )[0]
