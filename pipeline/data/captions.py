"""Where captions stand in a sample, and which of several is shown. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.decode import DecodeError, DecodeFault
from pipeline.errors import UserError

JSON = "json"
_IN_JSON = f"{JSON}:"

MAIN_CAPTION = 0.0
"""The draw that gives the main caption: the one of the largest weight, and the first of a list."""


@dataclass(frozen=True)
class CaptionSource:
    """A text of the sample by its extension, or a `field` of its JSON; and how often it is drawn, as a weight."""

    extension: str
    field: str | None
    weight: float

    @property
    def name(self) -> str:
        """As a config writes it: `txt`, `json:caption`."""
        return self.extension if self.field is None else f"{self.extension}:{self.field}"


@dataclass(frozen=True)
class CaptionSources:
    """The sources of a data set's captions, the largest weight first."""

    sources: tuple[CaptionSource, ...]

    @property
    def extensions(self) -> tuple[str, ...]:
        """The texts that captions are read from, each once."""
        return tuple(dict.fromkeys(source.extension for source in self.sources))

    def weights(self) -> dict[str, float]:
        """The sources by name, as a config writes them."""
        return {source.name: source.weight for source in self.sources}

    def choose(self, texts: Mapping[str, bytes | None], draw: float) -> str:
        """The caption of a sample, from those of its texts that it has, for a draw in [0, 1).

        Sources are drawn by their weights, among those that have a caption; of a list in a JSON all alike.

        Raises:
            DecodeError: none of them is a caption.
        """
        if len(self.sources) == 1:
            captions = _captions(self.sources[0], texts)
            return captions[0] if len(captions) == 1 else captions[int(draw * len(captions))]
        found: list[tuple[float, Sequence[str]]] = []
        faults: list[DecodeError] = []
        for source in self.sources:
            try:
                found.append((source.weight, _captions(source, texts)))
            except DecodeError as error:
                faults.append(error)
        if not found:
            raise faults[0]
        left = draw * sum(weight for weight, _ in found)
        chosen = 0
        while chosen + 1 < len(found) and left >= found[chosen][0]:
            left -= found[chosen][0]
            chosen += 1
        weight, captions = found[chosen]
        return captions[min(int(left / weight * len(captions)), len(captions) - 1)]


def parse_sources(weights: Mapping[str, float]) -> CaptionSources:
    """Read the names of sources with their weights: an extension (`txt`, `.caption`) or `json:field`.

    Raises:
        UserError: a name is empty, or given twice.
    """
    sources: list[CaptionSource] = []
    for name, weight in weights.items():
        is_field = name.lower().startswith(_IN_JSON)
        extension, field = (JSON, name[len(_IN_JSON) :]) if is_field else (name.lower().removeprefix("."), None)
        if not (field if is_field else extension) or (extension == JSON and not is_field):
            raise UserError(f"data.captions: {name!r} names no caption; write an extension such as txt, or json:field")
        source = CaptionSource(extension, field, weight)
        if source.name in {other.name for other in sources}:
            raise UserError(f"data.captions names {source.name} twice; give it one weight")
        sources.append(source)
    return CaptionSources(tuple(sorted(sources, key=lambda source: -source.weight)))


TEXT = parse_sources({"txt": 1.0})
"""The caption as img2dataset writes it: the file `key.txt`."""


def parse_attributes(content: bytes) -> dict[str, Any] | None:
    """A JSON's fields; None where it holds no object."""
    try:
        fields = json.loads(content)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _captions(source: CaptionSource, texts: Mapping[str, bytes | None]) -> Sequence[str]:
    """What a source has, at least one caption. Raises DecodeError for none."""
    content = texts.get(source.extension)
    if content is None:
        raise DecodeError(DecodeFault.MISSING_CAPTION, source.name)
    if source.field is None:
        try:
            caption = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DecodeError(DecodeFault.CAPTION_NOT_UTF8, str(error)) from error
        if not caption:
            raise DecodeError(DecodeFault.EMPTY_CAPTION, source.name)
        if "\0" in caption:  # as where a disk has zeroed a block
            raise DecodeError(DecodeFault.CAPTION_NOT_UTF8, source.name)
        return (caption,)
    value = (parse_attributes(content) or {}).get(source.field)
    if value is None:
        raise DecodeError(DecodeFault.MISSING_CAPTION, source.name)
    candidates = value if isinstance(value, list) else [value]
    captions = tuple(each.strip() for each in candidates if isinstance(each, str) and each.strip())
    if not captions:
        raise DecodeError(DecodeFault.EMPTY_CAPTION, source.name)
    return captions
