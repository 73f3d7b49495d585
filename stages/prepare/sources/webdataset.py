"""The user's own shards, as img2dataset writes them, indexed by `unclip shards index`. Imports no torch."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import RUNTIME, PositiveFloat
from pipeline.data.captions import JSON, CaptionSources, parse_sources
from pipeline.data.location import open_index, open_summary
from pipeline.data.place import ShardPlace
from pipeline.data.shards import SHARDS_PER_BLOCK, expand_shards, is_url
from pipeline.data.splits import Split, SplitCounts, check_split_sizes
from pipeline.data.summary import PICTURES, IndexSummary, ShardEntry, index_identity
from pipeline.errors import UserError
from stages.prepare.source import SAMPLE_KEY, Source, SourceSettings, TakenIn, position_of

if TYPE_CHECKING:
    from pipeline.data.mixture import Mixture
    from pipeline.data.reader import SampleReader

LICENCE = "The pictures and captions of data=webdataset are the user's own."
LICENCE_ID = "other"

COUNTED_WHEN_PLANNING = 200_000
"""A plan sorts so many samples into their splits itself. Of more, a split is not empty by accident."""

DEFAULT_CAPTION = "txt"
_LOOKED_AT = 100


class WebDatasetSettings(SourceSettings):
    """The user's own shards: directories, brace patterns or URLs, as img2dataset writes them.

    `weights` say how often an epoch shows the samples of each of `shards`. `caption` is the extension of the captions'
    files, or `json:field`; `captions` are several of these, with the weights by which one is drawn at each showing.
    `index_dir` is where the index is, if not beside the shards. Remote shards are kept in `cache_dir` once they were
    read, at most `cache_gib` of them.
    """

    source: Literal["webdataset"]
    shards: Annotated[str | tuple[str, ...], RUNTIME]
    weights: tuple[Annotated[Decimal, Field(gt=0, le=1000, allow_inf_nan=False)], ...] | None
    caption: str
    captions: dict[str, Annotated[PositiveFloat, Field(le=1e6)]] | None
    index_dir: Annotated[Path | None, RUNTIME]
    allow_shell_urls: Annotated[bool, RUNTIME]
    cache_dir: Annotated[Path, RUNTIME]
    cache_gib: Annotated[PositiveFloat | None, RUNTIME]

    @model_validator(mode="after")
    def _is_said_once(self) -> Self:
        if self.captions is not None and self.caption != DEFAULT_CAPTION:
            raise ValueError(
                f"data.caption={self.caption} and data.captions={self.captions} both say where captions are; set one"
            )
        if self.captions is not None and not self.captions:
            raise ValueError("data.captions={} names none; give for example 'data.captions={txt: 1}'")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(
                f"data.weights has {len(self.weights)} entries for {len(self.parts)} parts of data.shards; give one "
                "each, as in 'data.shards=[/data/a,/data/b]' 'data.weights=[1,0.5]'"
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The directories, patterns and URLs that `shards` names."""
        return (self.shards,) if isinstance(self.shards, str) else self.shards

    @property
    def caption_weights(self) -> dict[str, float]:
        """Where captions are, with weights."""
        return self.captions if self.captions is not None else {self.caption: 1.0}


def place_of(settings: WebDatasetSettings) -> ShardPlace:
    """Where a run finds the shards, for a process in any working directory."""
    place = ShardPlace(
        shards=settings.parts,
        allow_shell_urls=settings.allow_shell_urls,
        cache_dir=settings.cache_dir,
        cache_gib=settings.cache_gib,
        index_dir=settings.index_dir,
    )
    return place.from_anywhere()


def summary(settings: WebDatasetSettings) -> IndexSummary:
    """What the index says of the shards that `data.shards` names: quick, and enough to plan with.

    Raises:
        UserError: a shard does not exist, was not indexed, or changed since; or none has a caption where it is said.
    """
    chosen = open_summary(place_of(settings))
    _require_captions(sources_of(settings), chosen)
    _check_cache(settings, chosen)
    return chosen


def check(settings: WebDatasetSettings) -> None:
    """Raise `UserError` where `data.shards` names none, or URLs that are not allowed."""
    expand_shards(settings.parts, allow_shell_urls=settings.allow_shell_urls)


def identity(settings: WebDatasetSettings) -> dict[str, Any]:
    """What of the shards counts: the pictures and the texts that are read, how they are mixed, and how split."""
    texts = set(sources_of(settings).extensions) | ({JSON} if settings.split_key != SAMPLE_KEY else set())
    counted: dict[str, Any] = {
        "source": settings.source,
        "split_key": settings.split_key,
        "validation_fraction": settings.validation_fraction,
        "shards": index_identity(summary(settings), {PICTURES, *texts}),
        "captions": dict(sorted(sources_of(settings).weights().items())),
    }
    if settings.weights is not None:
        counted["mixture"] = mixture(settings).as_json()
    return counted


def sources_of(settings: WebDatasetSettings) -> CaptionSources:
    """Where captions are. Raises `UserError` for a name that is none."""
    return parse_sources(settings.caption_weights)


def mixture(settings: WebDatasetSettings) -> "Mixture":
    """How often an epoch shows the samples of each part of `data.shards`."""
    from pipeline.data.mixture import Mixture

    parts = [expand_shards(part, allow_shell_urls=settings.allow_shell_urls) for part in settings.parts]
    if settings.weights is None:
        return Mixture.even(sum(map(len, parts)))
    source_of_shard = tuple(number for number, shards in enumerate(parts) for _ in shards)
    return Mixture(source_of_shard, tuple(map(Fraction, settings.weights)))


def split_counts(settings: WebDatasetSettings) -> SplitCounts | None:
    """The samples of each split, where that is quick to tell; None too where the shards are not indexed.

    Raises:
        UserError: a split is too small to train or to measure on.
    """
    if settings.split_key != SAMPLE_KEY:
        return None
    try:
        samples = summary(settings).samples
    except UserError:
        return None  # the plan says so of the stage that takes the shards in
    if samples > COUNTED_WHEN_PLANNING:
        return None
    import numpy as np

    from pipeline.data.order import epoch_samples

    taken_in = take_in(settings)
    check_split_sizes(taken_in.positions.tolist(), settings.validation_fraction)
    training = np.flatnonzero(taken_in.splits == Split.TRAIN.code)
    shown = epoch_samples(training, taken_in.index.shard, taken_in.mixture)
    return SplitCounts(shown, len(taken_in.splits) - len(training))


def take_in(settings: WebDatasetSettings) -> TakenIn:
    """Take in indexed shards.

    The split is by the sample's key, or by the field of its JSON that `data.split_key` names.

    Raises:
        UserError: as `summary`; or a sample lacks the field.
    """
    import numpy as np

    from pipeline.data.reader import SampleReader

    place, sources = place_of(settings), sources_of(settings)
    whole = open_index(place)
    _require_captions(sources, IndexSummary(whole.shards, ""))
    has_caption = np.zeros(len(whole), bool)
    for extension in sources.extensions:
        if extension in whole.texts:
            has_caption |= whole.texts[extension].is_present
    index = whole.keep(has_caption, list(dict.fromkeys([*sources.extensions, JSON])))
    index = replace(index, shards=tuple(map(_counting_lost, index.shards, whole.shards)))
    reader = SampleReader(index, Path("/"), place.cache_dir, place.cache_bytes, remedy=f"{place.index_command} --again")
    _require_fields(sources, reader)
    positions = np.empty(len(index), np.float64)
    for row in range(len(index)):
        attributes = None if settings.split_key == SAMPLE_KEY else reader.attributes(row)
        positions[row] = position_of(settings, index.key(row), attributes)
    held_out = positions < settings.validation_fraction
    splits = np.where(held_out, Split.VALIDATION.code, Split.TRAIN.code).astype(np.uint8)
    return TakenIn(index, positions, splits, sources, mixture(settings))


def _counting_lost(kept: ShardEntry, whole: ShardEntry) -> ShardEntry:
    """A shard's entry, with the samples that have no caption where captions are counted among what is left out."""
    lost = whole.samples - kept.samples
    if not lost:
        return kept
    missing = kept.left_out.get("missing_caption", 0) + lost
    return replace(kept, left_out={**kept.left_out, "missing_caption": missing})


def _require_captions(sources: CaptionSources, chosen: IndexSummary) -> None:
    """Raise `UserError` where no sample has one of the texts that captions are to be read from."""
    texts = chosen.texts
    missing = next((source for source in sources.sources if not texts[source.extension]), None)
    if missing is not None:
        known = ", ".join(f"{name} ({count:,})" for name, count in texts.most_common()) or "no text at all"
        raise UserError(
            f"data.caption={missing.name}: no sample has {missing.extension}; they have {known}; set for example "
            f"data.caption={next(iter(texts), 'txt')}"
        )


def _require_fields(sources: CaptionSources, reader: "SampleReader") -> None:
    """Raise `UserError` where none of the first samples has one of the fields that captions are to be read from."""
    fields = [source.field for source in sources.sources if source.field is not None]
    if not fields or not len(reader.index):
        return
    known: set[str] = set()
    for row in range(min(_LOOKED_AT, len(reader.index))):
        known |= (reader.attributes(row) or {}).keys()
    missing = next((field for field in fields if field not in known), None)
    if missing is not None:
        raise UserError(
            f"data.caption=json:{missing}: none of the first {min(_LOOKED_AT, len(reader.index))} samples has that "
            f"field; theirs are {', '.join(sorted(known)) or 'none'}"
        )


def _check_cache(settings: WebDatasetSettings, chosen: IndexSummary) -> None:
    """Raise `UserError` where the cache would not hold the block that is read and the one that is fetched meanwhile."""
    if settings.cache_gib is None:
        return
    largest = sorted((shard.bytes for shard in chosen.shards if is_url(shard.name)), reverse=True)
    needed = sum(largest[: 2 * SHARDS_PER_BLOCK])
    if int(settings.cache_gib * 2**30) < needed:
        raise UserError(
            f"data.cache_gib={settings.cache_gib} does not hold two blocks of {SHARDS_PER_BLOCK} remote shards; "
            f"give {needed / 2**30:.3g} or more"
        )


SOURCE = Source(
    WebDatasetSettings,
    LICENCE,
    LICENCE_ID,
    take_in=take_in,
    split_counts=split_counts,
    summary=summary,
    identity=identity,
    place=place_of,
    check=check,
)
