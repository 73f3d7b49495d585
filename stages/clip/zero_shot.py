"""Zero-shot classification: classes' names in sentences, the nearest one to a picture (arXiv 2103.00020, 3.1)."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.clip.network import ClipModel, imagenet_class_names

_WORDNET = re.compile(r"n\d{8}")


def class_names(directories: Sequence[Path]) -> list[str]:
    """What classes are called, by the sorted directories of their pictures: the directories' names, with spaces for
    underscores; for the thousand of ImageNet, which are named by number, OpenAI's names."""
    of_imagenet = imagenet_class_names()
    if len(directories) == len(of_imagenet) and all(_WORDNET.fullmatch(each.name) for each in directories):
        return of_imagenet
    return [each.name.replace("_", " ") for each in directories]


@torch.no_grad()
def right_within(clip: ClipModel, image: Tensor, classes: Tensor, truth: Tensor, at: int) -> Tensor:
    """Whether the true class int64 [B] of pictures float [B, 3, S, S] is among the nearest `at`, bool [B]."""
    similarity = F.normalize(clip.encode_image(image).float(), dim=-1) @ classes.float()
    return (similarity.topk(min(at, classes.shape[1]), dim=1).indices == truth[:, None]).any(1)
