"""Captioned pictures that are drawn at run time: one or two coloured shapes on a background. Imports no torch.

Some pairs of colour and shape are never drawn for training or validation, so that composition can be measured.
"""

import io
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from functools import lru_cache
from itertools import product
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from pipeline.config import ADDED_LATER, Fraction, NotNegative, Positive, Seed
from pipeline.data.captions import TEXT, CaptionSources, parse_sources
from pipeline.data.splits import Split, SplitCounts, check_split_sizes, split_position
from pipeline.data.write import SourceSample
from stages.prepare.scene_drawing import Background, Colour, Position, Scene, SceneObject, Shape, Size, draw
from stages.prepare.source import SAMPLE_KEY, MadeSourceSettings, Source, split_of_sample

LICENCE = (
    "The pictures and captions of data=scenes are drawn and written by this project's code, and nobody else has rights "
    "in them; the project states no licence."
)
LICENCE_ID = "other"


class ScenesSettings(MadeSourceSettings):
    """Pictures drawn at run time: one or two coloured shapes on a background, captioned in several phrasings.

    `full_caption_share` of the captions say everything; of the others each attribute is left out with probability 0.3.
    Of the `captions_each` of a picture each showing draws one; what is measured is measured with the first.
    """

    source: Literal["scenes"]
    samples: Positive
    unseen_samples: NotNegative
    image_size: Annotated[Positive, Field(ge=64)]
    two_objects_share: Fraction
    full_caption_share: Annotated[Fraction, ADDED_LATER] = 0.9
    captions_each: Annotated[Positive, ADDED_LATER] = 1
    seed: Seed


Pair = tuple[Colour, Shape]

UNSEEN_PAIRS: frozenset[Pair] = frozenset(
    {
        (Colour.PURPLE, Shape.CIRCLE),
        (Colour.YELLOW, Shape.SQUARE),
        (Colour.CYAN, Shape.TRIANGLE),
        (Colour.RED, Shape.RING),
        (Colour.GREEN, Shape.MOON),
        (Colour.PINK, Shape.BAR),
    }
)
"""One per shape, each of another colour: every shape keeps seven colours and every colour at least five shapes."""

ALL_PAIRS: frozenset[Pair] = frozenset(product(Colour, Shape))
SEEN_PAIRS: frozenset[Pair] = ALL_PAIRS - UNSEEN_PAIRS

_OMISSION_PROBABILITY = 0.3
_CAPTIONS = "captions"
_OPPOSITE = (
    (Position.LEFT, Position.RIGHT),
    (Position.RIGHT, Position.LEFT),
    (Position.TOP, Position.BOTTOM),
    (Position.BOTTOM, Position.TOP),
)
_RELATION = {
    Position.LEFT: "to the left of",
    Position.RIGHT: "to the right of",
    Position.TOP: "above",
    Position.BOTTOM: "below",
}


class Attribute(StrEnum):
    """What a caption may say of a picture, or leave out."""

    SIZE = "size"
    COLOUR = "colour"
    SHAPE = "shape"
    POSITION = "position"
    BACKGROUND = "background"


class Phrasing(StrEnum):
    """How a caption is put; the plain one is "a small red circle at the left of a gray background"."""

    PLAIN = "plain"
    THERE_IS = "there is"
    PICTURE_OF = "a picture of"
    BACKGROUND_FIRST = "background first"
    KEYWORDS = "keywords"
    RELATION = "relation"


def pieces(settings: ScenesSettings) -> Iterator[tuple[int, bool]]:
    """Yield the number of each scene, and whether it is one of the unseen pairs, which come after all others."""
    for is_unseen, count in ((False, settings.samples), (True, settings.unseen_samples)):
        yield from ((number, is_unseen) for number in range(count))


def make(settings: ScenesSettings, piece: tuple[int, bool]) -> Iterator[tuple[SourceSample, Split]]:
    """Draw a scene of seen pairs for training or validation, or one of the unseen pairs.

    Sample i is a function of (seed, i) and of the settings of a picture; it does not depend on how many there are.

    Raises:
        UserError: the split key is no field of the samples.
    """
    number, is_unseen = piece
    if is_unseen:
        rng = random.Random(f"unseen/{settings.seed}/{number}")
        scene = random_scene(rng, 1, UNSEEN_PAIRS)
        # What is held out is held out to be measured: its captions leave nothing open.
        sample = draw_sample(f"unseen-{number:08d}", scene, settings.image_size, rng)
        yield _with_captions(sample, settings, []), Split.UNSEEN
        return
    rng = random.Random(f"scenes/{settings.seed}/{number}")
    objects = 2 if rng.random() < settings.two_objects_share else 1
    scene = random_scene(rng, objects, SEEN_PAIRS)
    wording = _random_wording(rng, objects, settings.full_caption_share)
    sample = draw_sample(_key(number), scene, settings.image_size, rng, *wording)
    rng = random.Random(f"captions/{settings.seed}/{number}")
    wordings = [_random_wording(rng, objects, settings.full_caption_share) for _ in range(settings.captions_each - 1)]
    sample = _with_captions(sample, settings, [caption(scene, *each) for each in wordings])
    yield sample, split_of_sample(sample, settings)


def _with_captions(sample: SourceSample, settings: ScenesSettings, others: Sequence[str]) -> SourceSample:
    """The sample with its captions in its JSON, its own first, where there may be several."""
    if settings.captions_each == 1:
        return sample
    return replace(sample, attributes={**sample.attributes, _CAPTIONS: [sample.caption, *others]})


def captions(settings: ScenesSettings) -> CaptionSources:
    """Where they stand: in the text, or as a list in the JSON, of which each showing draws one."""
    return TEXT if settings.captions_each == 1 else parse_sources({f"json:{_CAPTIONS}": 1.0})


@lru_cache(maxsize=1)
def split_counts(settings: ScenesSettings) -> SplitCounts | None:
    """The samples of each split; None where what is drawn decides.

    Raises:
        UserError: a split is too small to train or to measure on.
    """
    if settings.split_key != SAMPLE_KEY:
        return None
    positions = [split_position(_key(number)) for number in range(settings.samples)]
    check_split_sizes(positions, settings.validation_fraction)
    held_out = sum(position < settings.validation_fraction for position in positions)
    return SplitCounts(settings.samples - held_out, held_out)


def _key(number: int) -> str:
    return f"scene-{number:08d}"


def random_scene(rng: random.Random, objects: int, pairs: Collection[Pair]) -> Scene:
    """Choose a scene of one object anywhere, or of two on opposite sides, each in one of `pairs`."""
    ordered = sorted(pairs)
    places = rng.choice(_OPPOSITE) if objects == 2 else (rng.choice(list(Position)),)
    chosen = tuple(
        SceneObject(rng.choice(list(Size)), *rng.choice(ordered), position)  # pairs are (colour, shape)
        for position in places
    )
    return Scene(chosen, rng.choice(list(Background)))


def caption(scene: Scene, phrasing: Phrasing, named: Collection[Attribute]) -> str:
    """Put what is `named` of a scene in words. A relation needs two objects."""
    nouns = [_noun(item, named) for item in scene.objects]
    articles = [_with_article(noun) for noun in nouns]
    places = [item.position if Attribute.POSITION in named else None for item in scene.objects]
    background = f"{scene.background} background" if Attribute.BACKGROUND in named else None

    if phrasing is Phrasing.KEYWORDS:
        words = [word for noun, place in zip(nouns, places, strict=True) for word in (noun, place)]
        return ", ".join(word for word in (*words, background) if word)
    if phrasing is Phrasing.RELATION and places[0] is not None:
        relation = f"{articles[0]} {_RELATION[places[0]]} {articles[1]}"
        return f"{relation} on a {background}" if background else relation

    placed = " and ".join(
        f"{noun} at the {place}" if place else noun for noun, place in zip(articles, places, strict=True)
    )
    if phrasing is Phrasing.BACKGROUND_FIRST and background:
        return f"on a {background}, {placed}"
    whole = f"{placed} {'of' if places[0] else 'on'} a {background}" if background else placed
    match phrasing:
        case Phrasing.THERE_IS:
            return f"there is {whole}"
        case Phrasing.PICTURE_OF:
            return f"a picture of {whole}"
        case _:
            return whole


def draw_sample(
    key: str,
    scene: Scene,
    image_size: int,
    rng: random.Random,
    phrasing: Phrasing = Phrasing.PLAIN,
    named: Collection[Attribute] = frozenset(Attribute),
) -> SourceSample:
    """A scene as a picture with its caption, which by default leaves nothing open."""
    unseen = any((item.colour, item.shape) in UNSEEN_PAIRS for item in scene.objects)
    image = io.BytesIO()
    Image.fromarray(draw(scene, image_size, rng)).save(image, "PNG", compress_level=1)
    attributes = {**asdict(scene), "unseen": unseen, "named": sorted(named)}
    return SourceSample(key, image.getvalue(), "png", caption(scene, phrasing, named), attributes)


def _random_wording(
    rng: random.Random, objects: int, full_caption_share: float
) -> tuple[Phrasing, frozenset[Attribute]]:
    others = [phrasing for phrasing in Phrasing if phrasing is not Phrasing.PLAIN]
    if objects == 1:
        others.remove(Phrasing.RELATION)
    phrasing = Phrasing.PLAIN if rng.random() < 0.5 else rng.choice(others)
    if rng.random() < full_caption_share:
        return phrasing, frozenset(Attribute)
    named = {attribute for attribute in Attribute if rng.random() >= _OMISSION_PROBABILITY}
    if not named & {Attribute.COLOUR, Attribute.SHAPE}:
        named.add(rng.choice([Attribute.COLOUR, Attribute.SHAPE]))  # "an object" would be no caption
    return phrasing, frozenset(named)


def _noun(item: SceneObject, named: Collection[Attribute]) -> str:
    words = [
        item.size if Attribute.SIZE in named else None,
        item.colour if Attribute.COLOUR in named else None,
        item.shape if Attribute.SHAPE in named else "object",
    ]
    return " ".join(word for word in words if word)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


SOURCE = Source(
    ScenesSettings, LICENCE, LICENCE_ID, pieces=pieces, make=make, captions=captions, split_counts=split_counts
)
