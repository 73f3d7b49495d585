"""The tiny learner with a slow disk: from some checkpoint on, one process writes nothing until it is let go on."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

from pipeline.training.context import StageContext, StageResult
from pipeline.training.strategies.part import CheckpointPart
from pipeline.workflow.declaration import Catalog
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import CHECKPOINTS
from tests.support import tiny

GO_ON = "go-on"
SLOW_RANK = "TEST_SLOW_RANK"
SECONDS_BETWEEN_LOOKS = 0.01


def learn(context: StageContext) -> StageResult:
    """Learn, and write slowly from where the work directory's file `hold` says."""
    if context.process.rank != int(os.environ.get(SLOW_RANK, "0")):
        return tiny.learn(context)
    with held(from_samples=int((context.work / "hold").read_text())):
        return tiny.learn(context)


@contextmanager
def held(from_samples: int) -> Iterator[None]:
    """Have checkpoints from that one on written when the work directory has a file `go-on`, and not before."""
    write = CheckpointPart.write

    def slowly(self: CheckpointPart, cancelled: Event) -> dict[str, str]:
        work = self.directory.parent.parent
        while samples_of(self.directory) >= from_samples and not (work / GO_ON).exists() and not cancelled.is_set():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return write(self, cancelled)

    CheckpointPart.write = slowly
    try:
        yield
    finally:
        CheckpointPart.write = write


def samples_of(directory: Path) -> int:
    """At how many samples the checkpoint is taken that is written there."""
    return int(directory.name.partition(".")[0].removeprefix("samples-"))


def with_held_checkpoints(stage: FrozenStage, from_samples: int) -> FrozenStage:
    """The same stage, which its own process runs with the slow disk."""
    stage.work.mkdir(parents=True, exist_ok=True)
    (stage.work / "hold").write_text(str(from_samples))
    return stage.model_copy(update={"catalog": f"{__name__}:CATALOG"})


def in_flight(stage: FrozenStage) -> list[int]:
    """The checkpoints that are being written."""
    return sorted(samples_of(path) for path in (stage.work / CHECKPOINTS).glob("*.tmp-*"))


_LEARNER = replace(tiny.CATALOG.stages["learner"], run=f"{__name__}:learn")
CATALOG = Catalog({**tiny.CATALOG.stages, "learner": _LEARNER})
