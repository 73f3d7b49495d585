from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.report.select import select_runs


def names(outputs: Path, *asked: str) -> list[str]:
    return [record.name for record in select_runs(outputs, asked).records]


@pytest.mark.parametrize("asked", ["trial", "sweep:trial", "trial.*", "tr?al.[0-2]"])
def test_a_sweep_and_a_pattern_mean_its_members_in_their_order(outputs: Path, asked: str):
    assert names(outputs, asked) == ["trial.0", "trial.1", "trial.2"]


def test_a_run_that_several_names_mean_is_there_once(outputs: Path):
    assert names(outputs, "again", "trial.1", "trial.*") == ["again", "trial.1", "trial.0", "trial.2"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("nothing", "no run 'nothing' .*runs there: .*again"),
        ("no*", "no run matches 'no\\*' .*runs there: .*again"),
        ("sweep:other", "no sweep 'other' .*; sweeps there: trial"),
    ],
)
def test_an_unknown_name_lists_what_there_is(outputs: Path, asked: str, message: str):
    with pytest.raises(UserError, match=message):
        names(outputs, asked)


def test_only_what_was_asked_for_as_a_sweep_counts_as_its_member(outputs: Path):
    assert select_runs(outputs, ["sweep:trial", "again"]).members == ("trial.0", "trial.1", "trial.2")
    assert select_runs(outputs, ["trial"]).members == ()
