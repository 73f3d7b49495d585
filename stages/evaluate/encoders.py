"""What turns pictures into features, whichever network it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from stages.captions import CaptionEncoder
from stages.clip.foreign import load_foreign_clip
from stages.clip.network import ClipModel
from stages.evaluate import metric
from stages.evaluate.metric import Features, Made
from stages.evaluate.settings import EncoderSettings
from stages.pictures import resize

DINOV2_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Encoder:
    """`image`: pictures float [B, 3, S, S] in [-1, 1] -> features float32 [B, F]; `text`: B captions -> the same.

    Both of length 1 where there is a `text`, which CLIPs alone have.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Sequence[str]], Tensor] | None = None


class Collected:
    """The features of captions, real pictures and those made from the captions, in one encoder, batch by batch."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._found: list[Features] = []

    def add(self, made: Made) -> None:
        """Encode a batch."""
        text = None if self._encoder.text is None else self._encoder.text(made.captions)
        self._found.append(Features(self._encoder.image(made.real), self._encoder.image(made.final), text))

    def all(self) -> Features:
        """Those of all batches."""
        return joined(self._found)


def joined(parts: Sequence[Features]) -> Features:
    """The features of several batches, or of several processes, as one: what is computed of them counts each once."""
    texts = [each.text for each in parts if each.text is not None]
    return Features(
        torch.cat([each.real for each in parts]),
        torch.cat([each.made for each in parts]),
        torch.cat(texts) if texts else None,
    )


def of_clip(clip: ClipModel) -> Encoder:
    """A CLIP that was trained here."""
    captions = CaptionEncoder(clip)
    return Encoder(
        lambda image: F.normalize(clip.encode_image(image).float(), dim=-1),
        lambda texts: F.normalize(captions.encode(texts).embed.float(), dim=-1),
    )


def load_encoder(name: str, settings: EncoderSettings, device: torch.device) -> Encoder:
    """One that a file or directory holds. Raises `UserError` where it is missing or holds something else."""
    path = settings.find(name)
    match name:
        case metric.INCEPTION:
            return _inception(path, device)
        case metric.DINOV2:
            return _dinov2(path, device)
        case _:
            clip = load_foreign_clip(path, settings.open_clip_model, device)
            return Encoder(clip.encode_image, clip.encode_text)


def _inception(path: Path, device: torch.device) -> Encoder:
    """The 2048 pooled features of FID, as torch-fidelity computes them: on whole pixel values, resized as TensorFlow 1
    did it, which is what published figures are of."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        torch.load(path, weights_only=True)  # torch-fidelity itself would run code that a file brings along
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device).eval()
    except Exception as error:
        raise UserError(
            f"{path} does not hold FID's Inception ({type(error).__name__}); give torch-fidelity's file"
        ) from error

    def features(image: Tensor) -> Tensor:
        pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        with torch.autocast(device.type, enabled=False):
            return network(pixels)[0].float()

    return Encoder(features)


def _dinov2(path: Path, device: torch.device) -> Encoder:
    """The class token after the last layer norm, of pictures of 224 pixels (arXiv 2306.04675)."""
    from transformers import Dinov2Model

    try:
        network = Dinov2Model.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except Exception as error:
        raise UserError(
            f"{path} holds no DINOv2 that transformers can load ({type(error).__name__}: {error}); give a directory "
            "with its config.json and model.safetensors"
        ) from error
    network = network.to(device).eval()  # pyright: ignore[reportArgumentType]

    def features(image: Tensor) -> Tensor:
        mean, std = (image.new_tensor(each).reshape(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
        image = resize(image, DINOV2_SIZE).clamp(-1, 1)
        with torch.autocast(device.type, enabled=False):
            return network((image * 0.5 + 0.5 - mean) / std).pooler_output.float()

    return Encoder(features)
