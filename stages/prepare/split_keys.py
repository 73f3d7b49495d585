"""Which value of a sample decides its split: `data.split_key`. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from pipeline.data.splits import Split, split_at, split_position
from pipeline.data.write import SourceSample
from pipeline.errors import UserError
from stages.settings import SourceSettings

SAMPLE_KEY = "key"
"""The value of `data.split_key` that means the sample's own key; any other names a field of its JSON."""


def split_of_sample(sample: SourceSample, settings: SourceSettings) -> Split:
    """Train or validation, for a sample as a source gives it."""
    return split_at(position_of(settings, sample.key, sample.attributes), settings.validation_fraction)


def position_of(settings: SourceSettings, key: str, attributes: Mapping[str, Any] | None) -> float:
    """The position in [0, 1) of the key or of the field that `data.split_key` names.

    Raises:
        UserError: the sample has no such field.
    """
    if settings.split_key == SAMPLE_KEY:
        return split_position(key)
    fields = attributes or {}
    if settings.split_key not in fields:
        known = ", ".join(sorted({SAMPLE_KEY, *fields}))
        raise UserError(
            f"data.split_key {settings.split_key} is no field of sample {key}'s JSON; use one of its own: {known}"
        )
    return split_position(str(fields[settings.split_key]))
