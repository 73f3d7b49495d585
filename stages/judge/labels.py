"""What can be read off a drawn scene: the classes of every attribute, and a sample's labels."""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample
from stages.judge.settings import JudgeDataSettings
from stages.prepare.scene_drawing import Background, Colour, Position, Shape, Size
from stages.prepare.sources.scenes import ALL_PAIRS, Attribute, draw_sample, random_scene

CLASSES: dict[Attribute, tuple[str, ...]] = {
    Attribute.COLOUR: tuple(Colour),
    Attribute.SHAPE: tuple(Shape),
    Attribute.SIZE: tuple(Size),
    Attribute.POSITION: tuple(Position),
    Attribute.BACKGROUND: tuple(Background),
}


def labels(attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The class of every attribute, in the order of `CLASSES`, from a sample's JSON.

    None unless the picture has one object of which the caption says everything: only then can a picture that was made
    from the caption be held to it.
    """
    objects = attributes.get("objects", ())
    if len(objects) != 1 or set(attributes.get("named", ())) != set(Attribute):
        return None
    values = {**objects[0], Attribute.BACKGROUND: attributes["background"]}
    return tuple(classes.index(values[attribute]) for attribute, classes in CLASSES.items())


def judge_samples(settings: JudgeDataSettings) -> Iterator[tuple[SourceSample, Split]]:
    """Single objects of all pairs of colour and shape, fully captioned: first those to learn from, then those held out.

    Sample i is a function of (seed, i), and none is a sample of `data=scenes`.
    """
    for number in range(settings.samples + settings.validation_samples):
        rng = random.Random(f"judge/{settings.seed}/{number}")
        split = Split.TRAIN if number < settings.samples else Split.VALIDATION
        yield draw_sample(f"judge-{number:08d}", random_scene(rng, 1, ALL_PAIRS), settings.image_size, rng), split


def true_labels(images: CaptionedImages, rows: Iterable[int]) -> Tensor:
    """The classes of every row's picture, int64 [N, A] in the order of `CLASSES`; each row must be one to judge."""
    found = [labels(images.data.attributes(int(row))) for row in rows]
    assert all(each is not None for each in found), "only pictures of one object, fully described, are judged"
    return torch.tensor(found)
