"""The embeddings that `embed` writes and prior and decoder read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.workflow.artifacts import Artifact
from stages.clip.settings import require_same_clip

EMBEDDINGS_FILE = "embeddings.safetensors"

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


@dataclass(frozen=True)
class Embeddings:
    """Every sample's embeddings by its row in the index (not normalised), and the training split's statistics."""

    image_embed: Tensor  # float32 [N, E]
    text_embed: Tensor  # float32 [N, E]
    whitening: Whitening  # of image_embed


def blank_embeddings(samples: int, width: int) -> Embeddings:
    """What stands for embeddings where only their size counts."""
    blank = torch.ones(samples, width)
    return Embeddings(blank, blank, Whitening(torch.zeros(width), torch.ones(width)))


def save_embeddings(directory: Path, embeddings: Embeddings) -> None:
    """Write `embeddings.safetensors`."""
    tensors = {
        "image_embed": embeddings.image_embed,
        "text_embed": embeddings.text_embed,
        "image_embed_mean": embeddings.whitening.mean,
        "image_embed_std": embeddings.whitening.std,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / EMBEDDINGS_FILE)


def load_embeddings(directory: Path) -> Embeddings:
    """Read what `save_embeddings` wrote; the tensors are mapped from the file, not copied."""
    tensors = load_file(directory / EMBEDDINGS_FILE)
    whitening = Whitening(mean=tensors["image_embed_mean"], std=tensors["image_embed_std"])
    return Embeddings(tensors["image_embed"], tensors["text_embed"], whitening)


def load_clip_embeddings(artifact: Artifact, clip: Artifact) -> Embeddings:
    """The embeddings of an artifact, which must be that CLIP's."""
    require_same_clip(artifact, clip)
    return load_embeddings(artifact.path)
