"""The stage `prepare`: captioned pictures as WebDataset shards with an index and splits."""

from collections.abc import Iterator

from pipeline.data.faults import check_left_out
from pipeline.data.make import make_prepared
from pipeline.data.prepared import write_prepared
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.splits import Split, check_split_sizes
from pipeline.data.summary import IndexSummary
from pipeline.data.write import SourceSample
from pipeline.training.context import StageContext, StageResult
from stages.prepare.source import make_samples
from stages.prepare.sources import emoji, scenes, webdataset
from stages.prepare.split_keys import position_of
from stages.settings import EmojiSettings, PrepareSettings, ScenesSettings, WebDatasetSettings

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
            taken_in = webdataset.take_in(data)
            index, splits = taken_in.index, taken_in.splits
            check_left_out(index.shards, context.frozen.trainer.max_faulty_share)
            check_split_sizes(taken_in.positions.tolist(), data.validation_fraction)
            write_prepared(
                context.output,
                index=index,
                splits=splits,
                captions=webdataset.sources_of(data),
                mixture=webdataset.mixture(data),
            )
        case ScenesSettings() | EmojiSettings():
            positions: list[float] = []
            index, splits = make_prepared(context.output, _made(context, data, positions), data.shard_samples)
            check_split_sizes(positions, data.validation_fraction)
    counts = {split.value: int((splits == split.code).sum()) for split in Split}
    licence, licence_id = LICENCES[data.source]
    numbers = {"samples": counts, "licence": licence, "licence_id": licence_id}
    metrics = {f"{name}_samples": float(count) for name, count in counts.items()}
    summary = IndexSummary(index.shards, "")
    for name, found in (("left_out", summary.left_out), ("skipped", summary.skipped)):
        metrics |= {f"{name}_{reason}": float(count) for reason, count in sorted(found.items())}
        for reason, count in found.most_common():
            print(f"{name.replace('_', ' ')}: {count:,} {reason}: {EXPLANATIONS[reason]}", flush=True)
    return StageResult(numbers, metrics, len(index))


def _made(
    context: StageContext, data: ScenesSettings | EmojiSettings, positions: list[float]
) -> Iterator[tuple[SourceSample, Split]]:
    for number, (sample, split) in enumerate(make_samples(data), 1):
        context.step(number, 0, f"{number:,} pictures made")
        if split is not Split.UNSEEN:
            positions.append(position_of(data, sample.key, sample.attributes))
        yield sample, split
