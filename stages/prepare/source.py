"""What a source of captioned pictures is, and which value of a sample decides its split. Imports no torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Fraction, Positive, Settings
from pipeline.data.captions import TEXT, CaptionSources
from pipeline.data.place import ShardPlace
from pipeline.data.splits import Split, SplitCounts, split_at, split_position
from pipeline.data.summary import IndexSummary
from pipeline.data.write import SourceSample
from pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.data.index import ShardIndex
    from pipeline.data.mixture import Mixture

SAMPLE_KEY = "key"
"""The value of `data.split_key` that means the sample's own key; any other names a field of its JSON."""


class SourceSettings(Settings):
    """What every source of captioned pictures has, beside `source`, its name."""

    split_key: str
    validation_fraction: Fraction


class MadeSourceSettings(SourceSettings):
    """What every source has whose pictures are made, and written in shards of `shard_samples`."""

    shard_samples: Positive


@dataclass(frozen=True, eq=False)
class TakenIn:
    """The samples of shards that are there already, and how they are to be read. N samples."""

    index: "ShardIndex"
    positions: "NDArray[np.float64]"  # [N], where each stands in the split
    splits: "NDArray[np.uint8]"  # [N], codes of Split
    captions: CaptionSources
    mixture: "Mixture"


@dataclass(frozen=True)
class Source:
    """A source of captioned pictures. The module of each in `sources/` defines one, `SOURCE`.

    `pieces` lists what there is to make, in a fixed order, and `make` makes the samples of one piece, each with its
    split: of settings and piece alone, since any process may make it. Both stand at the top of the module, and pieces
    can be pickled. A source of shards that are there already has `take_in` instead. All are given the settings first,
    and raise `UserError` for what cannot work.
    `split_counts` says how many samples each split has, None where that cannot be told before the data is prepared.
    `summary` tells of the shards that are there already what their index says.
    `identity` is what counts of shards that are there already (it raises `UserError` while they cannot be read),
    `place` where a run finds them, `check` what can be known to be wrong at once.
    `licence` says what a model card tells of the pictures' rights, `licence_id` is its name among model hubs.
    """

    settings: type[SourceSettings]
    licence: str
    licence_id: str
    pieces: Callable[[Any], Iterable[Any]] | None = None
    make: Callable[[Any, Any], Iterable[tuple[SourceSample, Split]]] | None = None
    take_in: Callable[[Any], TakenIn] | None = None
    captions: Callable[[Any], CaptionSources] = lambda settings: TEXT
    split_counts: Callable[[Any], SplitCounts | None] = lambda settings: None
    summary: Callable[[Any], IndexSummary] | None = None
    identity: Callable[[Any], dict[str, Any]] | None = None
    place: Callable[[Any], ShardPlace | None] = lambda settings: None
    check: Callable[[Any], None] = lambda settings: None


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
