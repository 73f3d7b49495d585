"""Draws coloured shapes with anti-aliased edges on a plain background, from signed distances. Imports no torch."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


class Shape(StrEnum):
    """The outlines: of ten tried, the set that a small classifier told apart best when small, noisy, at 16 px."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    RING = "ring"
    MOON = "moon"
    BAR = "bar"


class Colour(StrEnum):
    """The colours of objects."""

    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    CYAN = "cyan"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"


class Background(StrEnum):
    """The colours of backgrounds; none of them is the colour of an object."""

    WHITE = "white"
    BLACK = "black"
    GRAY = "gray"
    BROWN = "brown"


class Size(StrEnum):
    """The sizes of objects."""

    SMALL = "small"
    BIG = "big"


class Position(StrEnum):
    """The places of objects."""

    LEFT = "left"
    RIGHT = "right"
    TOP = "top"
    BOTTOM = "bottom"
    CENTER = "center"


@dataclass(frozen=True)
class SceneObject:
    """What can be said of one object."""

    size: Size
    colour: Colour
    shape: Shape
    position: Position


@dataclass(frozen=True)
class Scene:
    """What can be said of one picture."""

    objects: tuple[SceneObject, ...]
    background: Background


_COLOUR_RGB = {
    Colour.RED: (215, 25, 30),
    Colour.ORANGE: (255, 140, 0),
    Colour.YELLOW: (252, 225, 30),
    Colour.GREEN: (30, 150, 50),
    Colour.CYAN: (40, 210, 225),
    Colour.BLUE: (25, 70, 225),
    Colour.PURPLE: (150, 30, 150),
    Colour.PINK: (255, 130, 190),
}
_BACKGROUND_RGB = {
    Background.WHITE: (248, 248, 248),
    Background.BLACK: (12, 12, 12),
    Background.GRAY: (128, 128, 128),
    Background.BROWN: (115, 68, 30),
}
# Shares of the picture's width: centres (right, down) and radii.
_CENTRE = {
    Position.LEFT: (0.27, 0.5),
    Position.RIGHT: (0.73, 0.5),
    Position.TOP: (0.5, 0.27),
    Position.BOTTOM: (0.5, 0.73),
    Position.CENTER: (0.5, 0.5),
}
_RADIUS = {Size.SMALL: 0.14, Size.BIG: 0.235}

PLACE_JITTER = 0.02
SIZE_JITTER = 0.07
ROTATION_JITTER_DEGREES = 10.0
COLOUR_JITTER = 10
_REACH = 1.2
"""How far a shape may reach from its centre, in radii."""


def draw(scene: Scene, image_size: int, rng: random.Random) -> NDArray[np.uint8]:
    """Draw a scene, uint8 [image_size, image_size, 3] RGB; place, size, rotation and colour are jittered by `rng`.

    Later objects cover earlier ones.
    """
    canvas = np.empty((image_size, image_size, 3), np.float32)
    canvas[:] = _jittered(_BACKGROUND_RGB[scene.background], rng)
    for item in scene.objects:
        _draw_object(canvas, item, rng)
    return (canvas + 0.5).astype(np.uint8)


def _draw_object(canvas: Field, item: SceneObject, rng: random.Random) -> None:
    width = canvas.shape[0]
    centre = [(share + rng.uniform(-PLACE_JITTER, PLACE_JITTER)) * width for share in _CENTRE[item.position]]
    radius = _RADIUS[item.size] * width * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)
    angle = math.radians(rng.uniform(-ROTATION_JITTER_DEGREES, ROTATION_JITTER_DEGREES))
    colour = _jittered(_COLOUR_RGB[item.colour], rng)

    columns, rows = (
        slice(max(0, math.floor(place - _REACH * radius) - 1), min(width, math.ceil(place + _REACH * radius) + 1))
        for place in centre
    )
    right = ((np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - centre[0]) / radius)[None, :]
    down = ((np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - centre[1]) / radius)[:, None]
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    distance = _DISTANCE[item.shape](cos * right + sin * down, cos * down - sin * right)
    # The share of a pixel that a straight edge at this distance covers.
    coverage = np.clip(0.5 - distance * np.float32(radius), 0, 1)[:, :, None]
    window = canvas[rows, columns]
    window += coverage * (colour - window)


def _jittered(rgb: tuple[int, int, int], rng: random.Random) -> Field:
    jittered = [min(255.0, max(0.0, value + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER))) for value in rgb]
    return np.array(jittered, np.float32)


def _circle(right: Field, down: Field) -> Field:
    return np.sqrt(right * right + down * down) - np.float32(0.95)


def _box(right: Field, down: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(right) - np.float32(half_width), np.abs(down) - np.float32(half_height))


def _square(right: Field, down: Field) -> Field:
    return _box(right, down, 0.85, 0.85)


def _bar(right: Field, down: Field) -> Field:
    return _box(right, down, 1.05, 0.38)


def _ring(right: Field, down: Field) -> Field:
    return np.abs(np.sqrt(right * right + down * down) - np.float32(0.76)) - np.float32(0.25)


def _moon(right: Field, down: Field) -> Field:
    bite = np.sqrt((right - np.float32(0.5)) ** 2 + down * down) - np.float32(0.85)
    return np.maximum(np.sqrt(right * right + down * down) - np.float32(1.05), -bite)


def _triangle(right: Field, down: Field) -> Field:
    """Equilateral, point up; its base lies half as far below the centre as its point is above it."""
    inradius = np.float32(0.55)
    slope = np.abs(right) * np.float32(math.sqrt(0.75)) - down * np.float32(0.5)
    return np.maximum(slope, down) - inradius


_DISTANCE: dict[Shape, Callable[[Field, Field], Field]] = {
    Shape.CIRCLE: _circle,
    Shape.SQUARE: _square,
    Shape.TRIANGLE: _triangle,
    Shape.RING: _ring,
    Shape.BAR: _bar,
    Shape.MOON: _moon,
}
"""Signed distances in radii, negative inside, from (right, down) offsets in radii."""
