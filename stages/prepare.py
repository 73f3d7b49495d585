"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.index import ShardIndex
from pipeline.data.prepared import write_prepared
from pipeline.data.splits import Split
from pipeline.data.walk import index_shards, without_times
from pipeline.data.write import SourceSample, write_shards
from pipeline.training.context import StageContext, StageResult
from stages.settings import EmojiSettings, PrepareSettings, ScenesSettings, WebDatasetSettings
from stages.sources import emoji, scenes, webdataset
from stages.sources.registry import make_samples

SHARDS = "shards"
LICENCES = {"scenes": scenes.LICENCE, "emoji": emoji.LICENCE, "webdataset": webdataset.LICENCE}


def run(context: StageContext) -> StageResult:
    """Make a built-in source's shards, or take the user's own in; publish index and splits."""
    data = context.settings_as(PrepareSettings).data
    match data:
        case WebDatasetSettings():
            index, splits, root = webdataset.take_in(data, data.cache_dir)
            write_prepared(context.output, index=index, splits=splits, shards_root=root, cache_dir=data.cache_dir)
        case ScenesSettings() | EmojiSettings():
            index, splits = _make(context, data)
            write_prepared(context.output, index=index, splits=splits, shards_root=context.output / SHARDS)
    counts = {split.value: int((splits == split.code).sum()) for split in Split}
    numbers = {"samples": counts, "licence": LICENCES[data.source]}
    return StageResult(numbers, {f"{name}_samples": float(count) for name, count in counts.items()}, len(index))


def _make(context: StageContext, data: ScenesSettings | EmojiSettings) -> tuple[ShardIndex, np.ndarray]:
    directory = context.output / SHARDS
    splits: list[int] = []

    def samples() -> Iterator[SourceSample]:
        for sample, split in make_samples(data):
            splits.append(split.code)
            context.step(len(splits), 0, f"{len(splits):,} pictures made")
            yield sample

    shards = write_shards(directory, samples(), data.shard_samples)
    names = [Path(shard).name for shard in shards]
    index = without_times(index_shards(names, directory, directory))
    return index, np.array(splits, np.uint8)
