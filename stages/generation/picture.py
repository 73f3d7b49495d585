"""A picture that was made, with what it takes to make it again, also as a PNG's metadata. Imports no torch."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field, ValidationError

from pipeline.config import Fraction, Settings
from pipeline.data.decode import DecodeError, decode_rgb, rgb_of
from pipeline.errors import UserError
from stages.generation.options import GenerationOptions

CHUNK = "unclip"
"""The text chunk of a PNG that holds its recipe."""


class Operation(StrEnum):
    """What made a picture."""

    TEXT_TO_IMAGE = "text_to_image"
    VARIATION = "variation"
    INTERPOLATION = "interpolation"
    CAPTION_INTERPOLATION = "caption_interpolation"
    TEXT_DIFF = "text_diff"
    INPAINTING = "inpainting"
    IMAGE_TO_IMAGE = "image_to_image"


class Noise(StrEnum):
    """The noise x_T along an interpolation: that of its first end, or interpolated between those of both."""

    FIXED = "fixed"
    INTERPOLATED = "interpolated"


class Recipe(Settings):
    """Everything that one picture follows from, its batch aside.

    `artifacts` are the fingerprints of the networks by stage. `captions` is one, or the two ends of an interpolation
    or of a text diff. `share` is how far it is on the way between two ends, `strength` how much of a picture is drawn
    anew. `sources` are the SHA-256 of the pixels of the pictures that it was made from.
    """

    operation: Operation
    run: str
    artifacts: dict[str, str]
    version: str
    captions: tuple[str, ...] = ()
    seed: int = Field(ge=-(2**63), lt=2**63)
    options: GenerationOptions = GenerationOptions()
    share: Fraction = 0.0
    strength: Fraction = 1.0
    noise: Noise = Noise.FIXED
    sources: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """A line for people."""
        said = " -> ".join(self.captions)
        name = self.operation.value.replace("_", " ")
        share = f" at {self.share:g}" if self.operation in _BETWEEN else ""
        return said if self.operation is Operation.TEXT_TO_IMAGE else f"{name}{share}{': ' if said else ''}{said}"


_MADE_FROM = {
    Operation.TEXT_TO_IMAGE: (1, 0),
    Operation.VARIATION: (0, 1),
    Operation.INTERPOLATION: (0, 2),
    Operation.CAPTION_INTERPOLATION: (2, 0),
    Operation.TEXT_DIFF: (2, 1),
    Operation.INPAINTING: (1, 2),
    Operation.IMAGE_TO_IMAGE: (1, 1),
}
"""Captions and pictures that an operation is of."""
_BETWEEN = (Operation.INTERPOLATION, Operation.CAPTION_INTERPOLATION, Operation.TEXT_DIFF)


@dataclass(frozen=True, eq=False)
class Picture:
    """RGB, 8 bits, and its recipe. A notebook shows it."""

    image: Image.Image
    recipe: Recipe

    def save(self, path: str | Path) -> None:
        """Write a PNG that carries the recipe, and caption, seed and run in words that other programs show."""
        Path(path).write_bytes(self._repr_png_())

    def _repr_png_(self) -> bytes:
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("Description", self.recipe.title.replace("\0", ""))
        texts.add_itxt("Software", f"unclip {self.recipe.version}, run {self.recipe.run}, seed {self.recipe.seed}")
        texts.add_itxt(CHUNK, self.recipe.model_dump_json(), zip=True)
        content = io.BytesIO()
        self.image.save(content, "PNG", pnginfo=texts)
        return content.getvalue()


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG carries. Raises `UserError` for a file that is none, or was made by something else."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # text may stand behind the pixels
            content = _texts(picture).get(CHUNK)
    except OSError as error:
        why = (
            "is no PNG" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error.strerror or error})"
        )
        raise UserError(f"{path} {why}; give a picture that unclip made") from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); give a picture that unclip made") from error
    if content is None:
        raise UserError(f"{path} does not say how it was made; give a PNG as unclip wrote it, not one that was edited")
    try:
        recipe = Recipe.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path} was made by another version of unclip ({key}: {fault['msg']}); use that version"
        ) from error
    captions, sources = _MADE_FROM[recipe.operation]
    if (len(recipe.captions), len(recipe.sources)) != (captions, sources):
        raise UserError(
            f"{path} contradicts itself: {recipe.operation.value} is of {captions} captions and {sources} pictures, "
            f"not of {len(recipe.captions)} and {len(recipe.sources)}; give a PNG as unclip wrote it"
        )
    return recipe


def _texts(picture: Image.Image) -> Mapping[str, Any]:
    return getattr(picture, "text", {})


def as_image(given: "str | Path | Image.Image | Picture") -> Image.Image:
    """A picture of the user's as RGB, upright, transparency on white. Raises `UserError` if it is none."""
    if isinstance(given, Picture):
        return given.image
    try:
        if isinstance(given, Image.Image):
            return rgb_of(given)
        return decode_rgb(Path(given).read_bytes())
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror or error}); give the path of a picture") from error
    except DecodeError as error:
        raise UserError(f"{given} is no picture that can be used ({error}); give a PNG, JPEG or WebP") from error


def pixels_sha256(image: Image.Image) -> str:
    """The SHA-256 (hex) of a picture's size and pixels, whatever the file that it came in."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def require_mask(mask: Image.Image, image: Image.Image) -> None:
    """Raise `UserError` if a mask is not of its picture's size."""
    if mask.size != image.size:
        raise UserError(
            f"the mask has {mask.width} x {mask.height} pixels and the picture {image.width} x {image.height}; give a "
            "mask of the picture's size"
        )
