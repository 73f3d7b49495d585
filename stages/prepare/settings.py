"""The stage `prepare`: its settings are one of the sources', its output the data. Imports no torch."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings, one_of
from pipeline.data.place import ShardPlace
from pipeline.data.splits import SplitCounts
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Blocked, StageDeclaration, Workflow, modules_in
from pipeline.workflow.fingerprint import counted_settings
from stages.prepare.source import Source, SourceSettings

SOURCES: dict[str, Source] = {name: module.SOURCE for name, module in modules_in("stages.prepare.sources").items()}

if TYPE_CHECKING:
    DataSettings = SourceSettings
else:
    DataSettings = one_of([each.settings for each in SOURCES.values()], "source")


class PrepareSettings(Settings):
    """Makes or takes in the shards, and splits their samples."""

    data: DataSettings


class DataNumbers(Numbers):
    """Samples by split, and the licence of the pictures."""

    samples: dict[str, int]
    licence: str
    licence_id: str


def source_of(data: SourceSettings) -> Source:
    """The source that these are the settings of."""
    return next(each for each in SOURCES.values() if type(data) is each.settings)


@lru_cache(maxsize=1)
def split_counts(workflow: Workflow) -> SplitCounts | None:
    """How many samples each split of the workflow's data has, where that can be told before the data is prepared.

    Raises:
        UserError: a split is too small to train or to measure on.
    """
    for settings in workflow.of(PrepareSettings).values():
        return source_of(settings.data).split_counts(settings.data)
    return None


def check(_path: str, settings: PrepareSettings, workflow: Workflow) -> None:
    """The data is there, and enough."""
    source_of(settings.data).check(settings.data)
    split_counts(workflow)


def identity(settings: PrepareSettings) -> dict[str, Any]:
    """Made data is its settings; the user's own shards are what is read of them, wherever they are."""
    counted = counted_settings(settings)
    describe = source_of(settings.data).identity
    if describe is not None:
        try:
            counted["data"] = describe(settings.data)
        except UserError as error:
            raise Blocked(str(error)) from error
    return counted


def place(settings: PrepareSettings) -> ShardPlace | None:
    """Where this run finds the user's own shards, which the artifact refers to and does not hold."""
    return source_of(settings.data).place(settings.data)


PREPARE = StageDeclaration(
    version=3,
    settings=PrepareSettings,
    run="stages.prepare.run:run",
    rehearse="stages.prepare.run:rehearse",
    output="data",
    computes=False,
    numbers=DataNumbers,
    check=check,
    identity=identity,
    place=place,
)
