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
        self._no_caption = clip.tokenize([NO_CAPTION])

    def encode(self, captions: Sequence[str]) -> TextEncoding:
        """The encoding of B captions on the CLIP's device."""
        return self.encode_tokens(self._clip.tokenize(captions))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> TextEncoding:
        """The encoding of the token ids int64 [B, L] of B captions, on the CLIP's device."""
        return self._clip.encode_text(tokens.to(self._clip.pixel_mean.device))

    def encode_all_as(self, caption: str, count: int) -> TextEncoding:
        """The encoding of one caption, `count` times; `NO_CAPTION` is that of dropped ones."""
        return TextEncoding.stacked([self.encode([caption])] * count)

    def encode_dropping(self, tokens: Tensor, dropped: Tensor) -> tuple[TextEncoding, TextEncoding]:
        """The encoding of B captions by their token ids int64 [B, L], and the same with those dropped where `dropped`
        bool [B] is true: in one pass."""
        if self._no_caption.device != tokens.device:  # brought there once, and not at each step
            self._no_caption = self._no_caption.to(tokens.device)
        encoded = self.encode_tokens(torch.cat([tokens, self._no_caption]))
        whole, none = encoded[:-1], encoded[-1:]
        return whole, none.where(dropped, whole)
