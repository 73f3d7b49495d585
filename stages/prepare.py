"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

from collections import Counter
from collections.abc import Iterator

from pipeline.data.faults import check_left_out
from pipeline.data.make import make_prepared
from pipeline.data.prepared import write_prepared
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample
from pipeline.training.context import StageContext, StageResult
from stages.settings import EmojiSettings, PrepareSettings, ScenesSettings, WebDatasetSettings
from stages.sources import emoji, scenes, webdataset
from stages.sources.registry import make_samples

LICENCES = {
    "scenes": (scenes.LICENCE, scenes.LICENCE_ID),
    "emoji": (emoji.LICENCE, emoji.LICENCE_ID),
    "webdataset": (webdataset.LICENCE, webdataset.LICENCE_ID),
}
"""What a source's licence says, and its name among model hubs."""


def run(context: StageContext) -> StageResult:
    """Make a built-in source's shards, or take the user's own in; publish index and splits."""
    data = context.settings_as(PrepareSettings).data
    match data:
        case WebDatasetSettings():
            index, splits, root = webdataset.take_in(data, data.cache_dir)
            check_left_out(index.shards, context.frozen.trainer.max_faulty_share)
            write_prepared(
                context.output,
                index=index,
                splits=splits,
                shards_root=root,
                cache_dir=data.cache_dir,
                cache_bytes=webdataset.cache_bytes(data, index),
            )
        case ScenesSettings() | EmojiSettings():
            index, splits = make_prepared(context.output, _made(context, data), data.shard_samples)
    counts = {split.value: int((splits == split.code).sum()) for split in Split}
    licence, licence_id = LICENCES[data.source]
    numbers = {"samples": counts, "licence": licence, "licence_id": licence_id}
    metrics = {f"{name}_samples": float(count) for name, count in counts.items()}
    left_out = sum((Counter(shard.left_out) for shard in index.shards), Counter[str]())
    metrics |= {f"left_out_{reason}": float(count) for reason, count in sorted(left_out.items())}
    return StageResult(numbers, metrics, len(index))


def _made(context: StageContext, data: ScenesSettings | EmojiSettings) -> Iterator[tuple[SourceSample, Split]]:
    for number, made in enumerate(make_samples(data), 1):
        context.step(number, 0, f"{number:,} pictures made")
        yield made
