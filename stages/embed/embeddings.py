"""The file of embeddings that `embed` writes and prior and decoder read."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.prior.network import Whitening

EMBEDDINGS_FILE = "embeddings.safetensors"


@dataclass(frozen=True)
class Embeddings:
    """Every sample's embeddings by its row in the index (not normalised), and the training split's statistics."""

    image_embed: Tensor  # float32 [N, E]
    text_embed: Tensor  # float32 [N, E]
    whitening: Whitening  # of image_embed


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
