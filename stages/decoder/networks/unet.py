"""The paper's decoder network, a U-Net. Imports no torch before it builds one."""

from typing import TYPE_CHECKING, Annotated, Literal

from pipeline.config import ADDED_LATER, Positive
from stages.decoder.choice import DecoderNetwork
from stages.unet import UNetSettings, check_unet

if TYPE_CHECKING:
    from stages.decoder.network import Decoder


class UNetDecoderSettings(UNetSettings):
    """A U-Net with cross-attention to the caption's tokens and to those of the embedding.

    These are brought to `cross_attention_dim`; null is the width of the embeddings.
    """

    kind: Annotated[Literal["unet"], ADDED_LATER] = "unet"
    cross_attention_dim: Annotated[Positive | None, ADDED_LATER] = None


def build(network: UNetDecoderSettings, image_size: int, embed_dim: int) -> "Decoder":
    """A U-Net with new weights."""
    from stages.decoder.network import UNetDecoder

    return UNetDecoder(network, image_size, embed_dim, network.cross_attention_dim)


def check(path: str, network: UNetDecoderSettings, image_size: int, context_length: int | None) -> None:
    """Raise `UserError` if the U-Net cannot run on pictures and captions of these sizes."""
    check_unet(network, image_size, f"{path}.network", f"{path}.image_size", context_length)


NETWORK = DecoderNetwork(UNetDecoderSettings, build, check)
