"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from pipeline.data.faults import check_left_out
from pipeline.data.make import make_prepared
from pipeline.data.prepared import write_prepared
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.splits import Split, check_split_sizes
from pipeline.data.square import central_square
from pipeline.data.summary import IndexSummary
from pipeline.data.write import SourceSample
from pipeline.forecast.ahead import Ahead, DataAhead
from pipeline.forecast.prepared import known_of
from pipeline.training.context import StageContext, StageResult
from stages.prepare.settings import DataNumbers, PrepareSettings, source_of
from stages.prepare.source import MadeSourceSettings, SourceSettings, position_of

MADE_TO_TRY = 64
OVERHEAD_BYTES = 3 * 2 * 512 + 512
"""Of a sample in a tar besides its picture: three headers and paddings, and its texts."""


def run(context: StageContext) -> StageResult:
    """Make a source's shards, or take the user's own in; publish index and splits."""
    data = context.settings_as(PrepareSettings).data
    source = source_of(data)
    if source.take_in is not None:
        taken = source.take_in(data)
        index, splits, positions = taken.index, taken.splits, taken.positions.tolist()
        check_left_out(index.shards, context.frozen.trainer.max_faulty_share)
        write_prepared(context.output, index=index, splits=splits, captions=taken.captions, mixture=taken.mixture)
    else:
        assert source.samples is not None, "a source has samples or takes them in"
        assert isinstance(data, MadeSourceSettings), "a source that makes its samples says how large a shard is"
        positions: list[float] = []
        made = _made(context, data, source.samples(data), positions)
        index, splits = make_prepared(context.output, made, data.shard_samples)
    check_split_sizes(positions, data.validation_fraction)
    counts = {split.value: int((splits == split.code).sum()) for split in Split}
    metrics = {f"{name}_samples": float(count) for name, count in counts.items()}
    summary = IndexSummary(index.shards, "")
    for name, found in (("left_out", summary.left_out), ("skipped", summary.skipped)):
        metrics |= {f"{name}_{reason}": float(count) for reason, count in sorted(found.items())}
        for reason, count in found.most_common():
            print(f"{name.replace('_', ' ')}: {count:,} {reason}: {EXPLANATIONS[reason]}", flush=True)
    numbers = DataNumbers(samples=counts, licence=source.licence, licence_id=source.licence_id)
    return StageResult(numbers, metrics, len(index))


def rehearse(ahead: Ahead) -> DataAhead:
    """What is known of the data, for a forecast: of those that are made, the first few are made now."""
    if ahead.artifact is not None:
        return known_of(ahead.artifact, ahead.place)
    data = ahead.settings_as(PrepareSettings).data
    source = source_of(data)
    if source.summary is not None:
        summary = source.summary(data)
        return DataAhead(summary.samples, summary.samples / max(1, len(summary.shards)))
    assert source.samples is not None, "a source has samples or takes them in"
    assert isinstance(data, MadeSourceSettings), "a source that makes its samples says how large a shard is"
    started = time.monotonic()
    made = [sample for sample, _ in islice(source.samples(data), MADE_TO_TRY)]
    counts, seconds = source.split_counts(data), (time.monotonic() - started) / len(made)
    samples = None if counts is None else counts.training + counts.validation
    picture_bytes = sum(len(sample.image) for sample in made) / len(made)
    return DataAhead(
        samples,
        data.shard_samples,
        None if samples is None else round(samples * (picture_bytes + OVERHEAD_BYTES)),
        seconds,
        tuple(sample.caption for sample in made),
        lambda size: _decode_s([sample.image for sample in made], size),
    )


def _decode_s(pictures: Sequence[bytes], size: int) -> float:
    """Seconds of a core that reading one of these pictures takes."""
    started = time.process_time()
    for picture in pictures:
        central_square(picture, size)
    return (time.process_time() - started) / len(pictures)


def _made(
    context: StageContext,
    data: SourceSettings,
    samples: Iterable[tuple[SourceSample, Split]],
    positions: list[float],
) -> Iterator[tuple[SourceSample, Split]]:
    for number, (sample, split) in enumerate(samples, 1):
        context.step(number, 0, f"{number:,} pictures made")
        if split is not Split.UNSEEN:
            positions.append(position_of(data, sample.key, sample.attributes))
        yield sample, split
