import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workflow.in_use import COMMANDS, commands_at_work, recorded, store_lock
from pipeline.workflow.ownership import ATTEMPTS, SECONDS_UNTIL_GONE, Claim, at_work
from pipeline.workflow.runs import run_names
from tests.support.stores import keys, planned, record


def test_runs_of_two_stores_are_recorded_and_in_use_each_in_its_own(tmp_path: Path):
    plans = [planned(tmp_path / "a", "mu.0"), planned(tmp_path / "b", "mu.1", weight=0.9)]
    with recorded(plans) as made:
        assert [plan.config.run.name for plan in made] == ["mu.0", "mu.1"]
        for place, name, weight in (("a", "mu.0", 0.1), ("b", "mu.1", 0.9)):
            (command,) = commands_at_work(tmp_path / place)
            needs = command.needs
            assert command.process == os.getpid()
            assert needs.runs == run_names(tmp_path / place) == [name]
            assert set(needs.stages) == keys(record(tmp_path / place, name, weight=weight))
    assert commands_at_work(tmp_path / "a") == commands_at_work(tmp_path / "b") == []
    assert [path.name for path in (tmp_path / "a" / COMMANDS).iterdir()] == ["lock"]


def test_a_command_that_fails_is_at_work_no_more(tmp_path: Path):
    with pytest.raises(UserError), recorded([planned(tmp_path, "first")]):
        raise UserError("it failed")
    assert commands_at_work(tmp_path) == []
    assert run_names(tmp_path) == ["first"]


def test_what_a_command_says_of_its_needs_is_read_whole_or_not_trusted(tmp_path: Path):
    with recorded([planned(tmp_path, "first")]):
        (path,) = tmp_path.glob(f"{COMMANDS}/*/needs.json")
        path.write_text('{"runs": [1]}')
        with pytest.raises(UserError, match=r"needs.json cannot be read \(.*\); wait until the command"):
            commands_at_work(tmp_path)


def test_a_store_that_may_not_be_written_to_is_said_to_be_another_s(tmp_path: Path):
    (tmp_path / COMMANDS).write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*; ask whose store it is"), store_lock(tmp_path):
        pass


def test_of_another_host_s_process_signs_of_life_are_trusted_for_an_hour(tmp_path: Path):
    directory = tmp_path / ATTEMPTS
    directory.mkdir()
    claim = directory / "000001.json"
    claim.write_text(json.dumps(asdict(Claim(1, "far/boot/namespace", 1, 1, 60.0))))
    assert at_work(tmp_path) == "a process of far may be at work on it"
    before = time.time() - SECONDS_UNTIL_GONE - 60
    os.utime(claim, (before, before))
    assert at_work(tmp_path) is None
    (directory / "000001.alive").write_text("1")
    assert at_work(tmp_path) is not None
    (directory / "000001.over").touch()
    assert at_work(tmp_path) is None
    assert at_work(tmp_path / "nothing") is None
