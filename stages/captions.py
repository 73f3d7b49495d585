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
    def encode(self, captions: Sequence[str], dropped: Tensor | None = None) -> TextEncoding:
        """The encoding of B captions on the CLIP's device; those where `dropped` bool [B] is true count as ""."""
        if dropped is not None:
            captions = [NO_CAPTION if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]
        tokens = self._clip.tokenize(list(captions))
        return self._clip.encode_text(tokens.to(self._clip.pixel_mean.device))
