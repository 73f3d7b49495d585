"""Captions through the frozen text tower, with some of them dropped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.clip.network import ClipModel, TextEncoding

NO_CAPTION = ""


class CaptionEncoder:
    """Encodes captions without gradient. A dropped caption is the encoding of "", as in diffusers' pipelines."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextEncoding:
        """The encoding of B captions on the CLIP's device."""
        tokens = self._clip.tokenize(list(captions))
        return self._clip.encode_text(tokens.to(self._clip.pixel_mean.device))

    def encode_none(self, count: int) -> TextEncoding:
        """The encoding of `count` dropped captions."""
        return self.encode([NO_CAPTION] * count)

    def encode_dropping(self, captions: Sequence[str], dropped: Tensor) -> tuple[TextEncoding, TextEncoding]:
        """The encoding of B captions, and the same with those dropped where `dropped` bool [B] is true: in one pass."""
        encoded = self.encode([*captions, NO_CAPTION])
        whole, none = encoded[:-1], encoded[-1:]
        return whole, none.where(dropped, whole)
