import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import EXIT_USER_ERROR, main
from pipeline.errors import UserError
from pipeline.workflow import sealed
from pipeline.workflow.in_use import COMMANDS
from pipeline.workflow.runs import read_run, run_directory, run_names
from tests.support.command import said
from tests.support.stores import contents, finish, keys, record, there


@pytest.fixture
def outputs(tmp_path: Path) -> str:
    finish(record(tmp_path, "first").values())
    record(tmp_path, "second", weight=0.9)
    return str(tmp_path)


def test_nothing_is_removed_without_a_flag_and_what_would_be_is_said(outputs: str, tmp_path: Path):
    before = contents(tmp_path)
    gc, rm = said("gc", "--outputs", outputs, "--older-than", "0m"), said("rm", "first", "--outputs", outputs)
    assert "checkpoints" in gc
    assert "would be freed; --delete does it" in gc
    assert "decoder" in rm
    assert "first: " in rm
    assert "would be freed; --delete does it" in rm
    assert "too young" in said("gc", "--outputs", outputs)
    assert contents(tmp_path) == before


def test_with_the_flag_it_is_removed_and_what_was_freed_is_said(outputs: str, tmp_path: Path):
    kept = keys(record(tmp_path, "second", weight=0.9))
    assert "kB freed" in said("rm", "first", "--outputs", outputs, "--delete")
    assert run_names(tmp_path) == ["second"]
    assert "kB freed" in said("gc", "--outputs", outputs, "--older-than", "0m", "--delete")
    assert there(tmp_path) == there(tmp_path, "work") < kept
    assert "there is nothing to remove" in said("gc", "--outputs", outputs)


def test_on_a_disk_that_is_full_to_the_last_byte_space_is_freed_all_the_same(
    outputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(run_directory(tmp_path, "first"))
    files, mkdir = len(contents(tmp_path)), Path.mkdir

    def make(path: Path, *arguments: Any, **named: Any) -> None:
        if COMMANDS in path.parts and len(contents(tmp_path)) >= files:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", make)
    assert "stays" not in said("gc", "--outputs", outputs, "--older-than", "0m", "--delete")
    assert there(tmp_path) == there(tmp_path, "work") < keys(record(tmp_path, "second", weight=0.9))


def test_a_run_is_pinned_and_renamed(outputs: str, tmp_path: Path):
    assert said("gc", "--outputs", outputs, "--pin", "first") == "pinned: first\n"
    assert said("mv", "first", "third", "--outputs", outputs) == "first is third now\n"
    assert "pinned" in said("du", "--outputs", outputs)
    assert main(["rm", "third", "--outputs", outputs]) == EXIT_USER_ERROR
    assert said("gc", "--outputs", outputs, "--unpin", "third") == "unpinned: third\n"
    assert "decoder" in said("rm", "third", "--outputs", outputs)


def test_what_is_held_is_printed_as_a_table_and_as_json(outputs: str, tmp_path: Path):
    shutil.rmtree(run_directory(tmp_path, "first"))
    table, values = said("du", "--outputs", outputs), json.loads(said("du", "--outputs", outputs, "--json"))
    assert "no run needs it" in table
    assert [each["name"] for each in values["runs"]] == ["second"]
    assert values["total_bytes"] > values["runs"][0]["bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("gc --older-than 3x", "--older-than 3x: no age; write 4w, 30d, 12h, 90m or 0m"),
        ("gc --older-than -1d", "expected one argument"),
        ("gc --pin nothing", "no run 'nothing' under"),
        ("rm nothing", "no run 'nothing' under"),
        ("rm first nothing --delete", "no run 'nothing' under"),
        ("mv nothing other", "no run 'nothing' under"),
        ("mv first second", "there is a run second already"),
        ("mv first a/b", "run.name='a/b'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_changed(
    outputs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, line: str
):
    before = contents(tmp_path)
    command = [*arguments.split(), "--outputs", outputs]
    assert main(command) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_store_that_is_not_there_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("du", "gc"):
        assert main([command, "--outputs", str(tmp_path / "none")]) == EXIT_USER_ERROR
        assert "there is nothing at" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_a_sweep_shares_stands_in_its_status_once(tmp_path: Path):
    for name, weight in (("mu.0", 0.1), ("mu.1", 0.9)):
        record(tmp_path, name, "mu", weight=weight)
    shown = said("status", "mu", "--outputs", str(tmp_path))
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in shown.splitlines() if "│" in line]
    assert rows.count(["clip", "0-1"]) == 1
    assert [row for row in rows if row[0] == "decoder"] == [["decoder", "0"], ["decoder", "1"]]


def test_a_pin_and_a_removal_are_not_asked_for_at_once(outputs: str, capsys: pytest.CaptureFixture[str]):
    assert main(["gc", "--pin", "first", "--delete", "--outputs", outputs]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_record_that_may_not_be_read_is_not_advised_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record(tmp_path, "first")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sealed, "opened", refuse)
    with pytest.raises(UserError, match=r"run\.json cannot be read \(Permission denied\); ask whose it is$"):
        read_run(tmp_path, "first")
