"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
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
from pipeline.data.summary import IndexSummary
from pipeline.data.write import SourceSample, pack
from pipeline.errors import ProcessKilledError
from pipeline.training.context import StageContext, StageResult
from stages.prepare.settings import DataNumbers, PrepareSettings, source_of
from stages.prepare.source import MadeSourceSettings, Source, position_of


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
        index, splits = make_prepared(context.output, samples(), data.shard_samples, processes, look)
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
