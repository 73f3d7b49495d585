"""The watch for a training that hangs ends with the training."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.training.watch import HANG_WATCH
from tests.support import tiny
from tests.support.tiny import SCRIPT, frozen, run


@pytest.mark.parametrize("ends", ["failed", "interrupted", "finished"])
def test_whatever_ends_a_training_ends_the_watch_for_its_hanging(tmp_path: Path, ends: str):
    """A watch that lived on would end the process minutes later, in the midst of whatever it does by then."""

    def end(context: tiny.StageContext) -> None:
        seen.append(HANG_WATCH in [thread.name for thread in threading.enumerate()])
        if ends == "failed":
            raise UserError("enough")
        if ends == "interrupted":
            context.interruption.set()

    seen: list[bool] = []
    SCRIPT.at_samples, SCRIPT.happens = 16, end
    assert run(frozen(tmp_path, hang_after_s=300.0)).value == ends
    assert seen == [True]
    assert HANG_WATCH not in [thread.name for thread in threading.enumerate()]
