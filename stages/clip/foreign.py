"""CLIPs of others, in whatever shape open_clip knows, from local files: to measure with, not to train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from stages.clip.network import load_any_open_clip
from stages.pictures import resize


@dataclass(frozen=True, eq=False)
class ForeignClip:
    """Any model of open_clip with its tokenizer. Embeddings are float32 [B, E], of length 1."""

    model: Any
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device

    def encode_image(self, image: Tensor) -> Tensor:
        """Of square pictures float [B, 3, S, S] in [-1, 1], brought to the model's size (bicubic, antialiased)."""
        size = self.model.visual.image_size
        image = resize(image, size[0] if isinstance(size, tuple | list) else size).clamp(-1, 1)
        visual = self.model.visual
        mean, std = (image.new_tensor(each).reshape(1, 3, 1, 1) for each in (visual.image_mean, visual.image_std))
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.model.encode_image((image * 0.5 + 0.5 - mean) / std).float(), dim=-1)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Of B captions."""
        with torch.autocast(self.device.type, enabled=False):
            return F.normalize(self.model.encode_text(self.tokenize(list(captions)).to(self.device)).float(), dim=-1)


def load_foreign_clip(path: Path, model_name: str | None, device: torch.device) -> ForeignClip:
    """The model of a directory with an `open_clip_config.json`, or `model_name` with a file's weights.

    Raises:
        UserError: open_clip cannot build or load it.
    """
    try:
        model, tokenize = load_any_open_clip(path, str(model_name), device)
    except Exception as error:
        raise UserError(f"open_clip cannot load {path} ({type(error).__name__}: {error}); give another") from error
    return ForeignClip(model, tokenize, device)
