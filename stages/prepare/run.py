"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.faults import check_left_out
from pipeline.data.index import ShardIndex
from pipeline.data.make import make_prepared
from pipeline.data.pool import in_order
from pipeline.data.prepared import write_prepared
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.splits import Split, check_split_sizes
from pipeline.data.square import central_square
from pipeline.data.summary import IndexSummary
from pipeline.data.write import SourceSample, pack
from pipeline.errors import ProcessKilledError
from pipeline.forecast.prepared import known_of
from pipeline.forecast.rehearsal import ExpectedData, Rehearsal
from pipeline.training.context import StageContext, StageResult
from stages.prepare.settings import DataNumbers, PrepareSettings, source_of
from stages.prepare.source import MadeSourceSettings, Source, position_of

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
        assert isinstance(data, MadeSourceSettings), "a source that makes its samples says how large a shard is"
        index, splits, positions = _made(context, source, data)
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


def rehearse(rehearsal: Rehearsal) -> ExpectedData:
    """What is known of the data, for a forecast: of those that are made, the first few are made now."""
    if rehearsal.artifact is not None:
        return known_of(rehearsal.artifact, rehearsal.place)
    data = rehearsal.settings_as(PrepareSettings).data
    source = source_of(data)
    if source.summary is not None:
        summary = source.summary(data)
        return ExpectedData(summary.samples, summary.samples / max(1, len(summary.shards)))
    pieces, make = source.pieces, source.make
    assert pieces is not None, "a source makes its samples or takes them in"
    assert make is not None, "a source that says what there is to make can make it"
    assert isinstance(data, MadeSourceSettings), "a source that makes its samples says how large a shard is"
    started = time.monotonic()
    samples_of_pieces = (make(data, piece) for piece in pieces(data))
    made = [sample for sample, _ in islice(chain.from_iterable(samples_of_pieces), MADE_TO_TRY)]
    counts, seconds = source.split_counts(data), (time.monotonic() - started) / len(made)
    samples = None if counts is None else counts.training + counts.validation
    picture_bytes = sum(len(sample.image) for sample in made) / len(made)
    return ExpectedData(
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


@dataclass(frozen=True)
class _Made:
    """A sample as it stands in a shard, its split, and its position where it is for training or validation."""

    packed: bytes
    split: Split
    position: float | None


def _made(
    context: StageContext, source: Source, data: MadeSourceSettings
) -> tuple[ShardIndex, NDArray[np.uint8], list[float]]:
    """Make the samples in as many processes as the stage has threads; the shards do not depend on how many."""
    pieces, make = source.pieces, source.make
    assert pieces is not None, "a source makes its samples or takes them in"
    assert make is not None, "a source that says what there is to make can make it"
    processes = torch.get_num_threads()
    positions: list[float] = []
    done = 0

    def look() -> None:
        context.step(done, 0, f"{done:,} pictures made")

    def samples() -> Iterator[tuple[bytes, Split]]:
        nonlocal done
        for of_piece in in_order(partial(_make, make, data), pieces(data), processes, look):
            for made in of_piece:
                done += 1
                look()
                if made.position is not None:
                    positions.append(made.position)
                yield made.packed, made.split

    try:
        index, splits = make_prepared(
            context.output, samples(), data.shard_samples, source.captions(data), processes, look
        )
    except BrokenProcessPool as error:
        raise ProcessKilledError(
            "a process that makes pictures was killed, perhaps for want of memory; run again, or with fewer: "
            f"stage.{context.frozen.stage}.trainer.cpu_threads below {processes}"
        ) from error
    return index, splits, positions


def _make(
    make: Callable[[Any, Any], Iterable[tuple[SourceSample, Split]]], data: MadeSourceSettings, piece: Any
) -> list[_Made]:
    return [
        _Made(pack(sample), split, None if split is Split.UNSEEN else position_of(data, sample.key, sample.attributes))
        for sample, split in make(data, piece)
    ]
