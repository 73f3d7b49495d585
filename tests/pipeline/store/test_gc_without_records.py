"""What `gc` does where it cannot know what the runs need: nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.collect import find, pin, take_away
from pipeline.workflow.runs import RECORD, run_directory
from tests.support.stores import ALL_AGES, Stages, finish, record, there


def test_a_run_that_cannot_be_read_stops_it_for_what_it_needs_is_not_known(tmp_path: Path, two: tuple[Stages, Stages]):
    (run_directory(tmp_path, "second") / RECORD).write_text("{")
    with pytest.raises(UserError, match=r"runs/second/run.json cannot be read"):
        find(tmp_path, {}, **ALL_AGES)


def lose_the_record(outputs: Path) -> str:
    (run_directory(outputs, "second") / "pictures").mkdir()
    (run_directory(outputs, "second") / RECORD).unlink()
    return r"runs/second/run.json is gone; run second again, or remove it: unclip rm second --delete"


def empty_the_folder(outputs: Path) -> str:
    shutil.rmtree(run_directory(outputs, "second"))
    run_directory(outputs, "second").mkdir()
    return r"runs/second/run.json is gone; run second again, or remove it: unclip rm second --delete"


def have_a_file_in_place_of_a_run(outputs: Path) -> str:
    shutil.rmtree(run_directory(outputs, "second"))
    run_directory(outputs, "second").write_bytes(b"")
    return r"runs/second is no folder of a run; bring that back, or remove this: unclip rm second --delete"


def have_a_link_to_nothing_in_place_of_a_run(outputs: Path) -> str:
    shutil.rmtree(run_directory(outputs, "second"))
    run_directory(outputs, "second").symlink_to(outputs / "not mounted")
    return r"runs/second is no folder of a run; bring that back, or remove this: unclip rm second --delete"


def damage_what_a_pin_keeps(outputs: Path) -> str:
    finish(record(outputs, "second", weight=0.5).values())
    pin(outputs, "second", is_pinned=True)
    (earlier,) = (run_directory(outputs, "second") / "earlier").glob("*.json")
    earlier.write_bytes(b"{")
    return f"{earlier} cannot be read; what pinned run second keeps is not known: .* unclip gc --unpin second"


def link_what_a_pin_keeps_to_nothing(outputs: Path) -> str:
    finish(record(outputs, "second", weight=0.5).values())
    pin(outputs, "second", is_pinned=True)
    earlier = run_directory(outputs, "second") / "earlier"
    shutil.rmtree(earlier)
    earlier.symlink_to(outputs / "not mounted")
    return f"{earlier} cannot be read; what pinned run second keeps is not known: .* unclip gc --unpin second"


def have_a_file_in_place_of_the_runs(outputs: Path) -> str:
    shutil.rmtree(outputs / "runs")
    (outputs / "runs").write_bytes(b"")
    return "runs is no directory; bring that back"


def have_a_link_to_nothing_in_place_of_the_runs(outputs: Path) -> str:
    shutil.rmtree(outputs / "runs")
    (outputs / "runs").symlink_to(outputs / "not mounted")
    return "runs is no directory; bring that back"


def lose_the_runs(outputs: Path) -> str:
    shutil.rmtree(outputs / "runs")
    return "runs is gone, so that what the runs need is not known; bring it back, or if no run is left: mkdir"


@pytest.mark.parametrize(
    "lose",
    [
        lose_the_record,
        empty_the_folder,
        have_a_file_in_place_of_a_run,
        have_a_link_to_nothing_in_place_of_a_run,
        damage_what_a_pin_keeps,
        link_what_a_pin_keeps_to_nothing,
        have_a_file_in_place_of_the_runs,
        have_a_link_to_nothing_in_place_of_the_runs,
        lose_the_runs,
    ],
)
def test_where_records_are_lost_nothing_is_removed(
    tmp_path: Path, two: tuple[Stages, Stages], lose: Callable[[Path], str]
):
    line = lose(tmp_path)
    before = there(tmp_path)
    with pytest.raises(UserError, match=line):
        find(tmp_path, {}, **ALL_AGES)
    with pytest.raises(UserError, match=line):
        take_away(tmp_path, [], {})
    assert there(tmp_path) == before != set()
