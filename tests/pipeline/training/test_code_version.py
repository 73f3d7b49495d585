"""What an artifact says of the code that made it, and that nothing amiss with that ends a stage."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from pipeline.workflow.code import UNKNOWN, code_version
from pipeline.workflow.progress import Outcome, read_failure
from tests.support import ROOT
from tests.support.tiny import SCRIPT, finished, frozen, run


def no_metadata(_name: str) -> str:
    raise PackageNotFoundError("unclip")


def lose_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.workflow.code.metadata.version", no_metadata)


def hide_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def another_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


@pytest.mark.parametrize("lacking", [(lose_metadata,), (hide_git,), (another_owner,), (lose_metadata, hide_git)])
def test_a_stage_is_published_where_nothing_can_be_told_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: tuple[Callable[[pytest.MonkeyPatch], None], ...]
):
    stage = frozen(tmp_path, max_samples=8)
    for lack in lacking:
        lack(monkeypatch)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    release, _, commit = finished(stage).manifest.code_version.partition("+")
    assert (release == UNKNOWN) is (lose_metadata in lacking)
    is_checkout = (ROOT / ".git").exists()
    assert (commit == UNKNOWN) is (is_checkout and lacking != (lose_metadata,))


def test_the_code_s_version_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lose_both(_context: object) -> None:
        lose_metadata(monkeypatch)
        hide_git(monkeypatch)

    before = code_version()
    SCRIPT.at_samples, SCRIPT.happens = 16, lose_both
    stage = frozen(tmp_path)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert UNKNOWN in code_version()
    assert finished(stage).manifest.code_version == before
