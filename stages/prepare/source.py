"""Which module makes the samples of which source. Imports no torch."""

from collections.abc import Iterator

from pipeline.data.splits import Split, SplitCounts
from pipeline.data.write import SourceSample
from stages.settings import DataSettings, EmojiSettings, ScenesSettings, WebDatasetSettings


def make_samples(settings: ScenesSettings | EmojiSettings) -> Iterator[tuple[SourceSample, Split]]:
    """The samples of a built-in source, each with its split, in a fixed order.

    Raises:
        UserError: a setting of the source has a value that it does not know.
    """
    match settings:
        case ScenesSettings():
            from stages.prepare.sources import scenes

            return scenes.samples(settings)
        case EmojiSettings():
            from stages.prepare.sources import emoji  # loads the names of 5,000 emoji

            return emoji.samples(settings)


def split_counts(settings: DataSettings) -> SplitCounts | None:
    """The samples of each split, where they can be told before the data is prepared.

    Raises:
        UserError: a split is too small to train or to measure on.
    """
    match settings:
        case WebDatasetSettings():
            from stages.prepare.sources import webdataset

            return webdataset.split_counts(settings)
        case ScenesSettings():
            from stages.prepare.sources import scenes

            return scenes.split_counts(settings)
        case EmojiSettings():
            return None
