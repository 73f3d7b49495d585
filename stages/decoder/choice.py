"""What a network must be to be the decoder's. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings

if TYPE_CHECKING:
    from stages.decoder.network import Decoder


@dataclass(frozen=True)
class DecoderNetwork:
    """A choice of `stage.decoder.network`. The module of each in `networks/` defines one, `NETWORK`.

    `settings` is a class whose field `kind`, a Literal, is the choice's name. `build` makes the network of settings for
    pictures of an image size (pixels) and a CLIP's embeddings of a width; it alone may import torch. `check` raises
    `UserError` where no network can be built: it is given the path of the stage's settings, such as "stage.decoder",
    the network's settings, the image size, and the number of the caption's tokens, None where that is not known.
    """

    settings: type[Settings]
    build: Callable[[Any, int, int], "Decoder"]
    check: Callable[[str, Any, int, int | None], None] = lambda path, settings, image_size, context_length: None
