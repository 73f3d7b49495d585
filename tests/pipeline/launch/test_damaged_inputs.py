"""A run builds on finished stages only where their files are what they were."""

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli import main
from pipeline.config import OnDamage
from pipeline.errors import UserError
from pipeline.launch.local import LAUNCHER
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.plan import Plan
from pipeline.workflow.progress import Outcome
from pipeline.workflow.runs import record_run
from tests.support import ROOT
from tests.support.halves import plan_halves, starts

ALL_FINISHED = dict.fromkeys(("source", "right", "end"), Outcome.FINISHED)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenStage:
    """The finished source of run `a`, of which a byte was flipped."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = plan_halves(tmp_path, "a", {"left": {}})
    record_run(plan)
    frozen = [stage.frozen for stage in plan.stages if stage.frozen is not None]
    assert [run_stage(each, threading.Event()) for each in frozen] == [Outcome.FINISHED] * 3
    file_of(frozen[0]).write_text("sourcf")
    return frozen[0]


def file_of(stage: FrozenStage) -> Path:
    return stage.store.path(*stage.key) / "said.txt"


def other(outputs: Path, on_damage: OnDamage) -> Plan:
    return plan_halves(outputs, "b", {"right": {}}, on_damage=on_damage)


def test_where_it_is_to_stop_one_line_says_so_and_nothing_is_started(source: FrozenStage):
    for said in (rf"{file_of(source)} does not have .*: stage source is set aside", "stage source is blocked: "):
        with pytest.raises(UserError, match=f"{said}.*store.on_damage=rebuild"):
            start([other(source.outputs, OnDamage.STOP)], Display(), waits=True)
    assert set(starts(source.outputs)) == {"source", "left", "end-a"}


def test_where_it_is_to_rebuild_the_stage_runs_anew_and_what_was_made_of_it_stays(source: FrozenStage):
    text = io.StringIO()
    outcomes = start([other(source.outputs, OnDamage.REBUILD)], Display(Console(file=text, width=200)), waits=True)
    assert {each.stage: each.outcome for each in outcomes} == dict.fromkeys(
        ("source", "right", "end"), Outcome.FINISHED
    )
    assert {name: len(each) for name, each in starts(source.outputs).items()} == {
        "source": 2, "left": 1, "end-a": 1, "right": 1, "end-b": 1,
    }  # fmt: skip
    assert file_of(source).read_text() == "source"
    assert text.getvalue().count(str(file_of(source))) == 1


def test_damage_that_a_stage_finds_when_it_starts_is_mended_too(source: FrozenStage):
    outcomes = LAUNCHER.submit([other(source.outputs, OnDamage.REBUILD)], Display(Console(file=io.StringIO())))
    assert {each.stage: each.outcome for each in outcomes} == dict.fromkeys(
        ("source", "right", "end"), Outcome.FINISHED
    )
    assert len(starts(source.outputs)["source"]) == 2


def test_stages_that_meet_the_damage_at_the_same_time_all_wait_for_the_one_that_is_made_anew(source: FrozenStage):
    plan = plan_halves(
        source.outputs, "b", {name: {} for name in ("right", "third", "fourth")}, on_damage=OnDamage.REBUILD
    )
    outcomes = LAUNCHER.submit([plan], Display(Console(file=io.StringIO())))
    assert {each.stage: each.outcome for each in outcomes} == dict.fromkeys(
        ("source", "right", "third", "fourth", "end"), Outcome.FINISHED
    )
    assert len(starts(source.outputs)["source"]) == 2


def test_a_stage_whose_input_another_one_found_damaged_names_the_damage(source: FrozenStage):
    right = next(each.frozen for each in other(source.outputs, OnDamage.STOP).stages if each.name == "right")
    assert right is not None
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{file_of(source)} does not have .*: stage source is set aside"):
            right.open_inputs()


def test_what_is_damaged_in_another_store_is_made_here_and_left_as_it_is_there(source: FrozenStage, tmp_path: Path):
    mine = tmp_path / "mine"
    plan = plan_halves(mine, "b", {"left": {}}, on_damage=OnDamage.REBUILD, also_read=(source.outputs,))
    outcomes = start([plan], Display(Console(file=io.StringIO())), waits=True)
    assert {each.stage: each.outcome for each in outcomes} == {
        "source": Outcome.FINISHED, "left": Outcome.REUSED, "end": Outcome.FINISHED,
    }  # fmt: skip
    assert file_of(source).read_text() == "sourcf"
    assert (ArtifactStore(mine).path(*source.key) / "said.txt").read_text() == "source"


@pytest.mark.parametrize("says", ["source", "source, on another GPU"])
def test_what_was_made_of_earlier_bytes_is_pointed_out_where_those_made_anew_are_others(
    source: FrozenStage, says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError):
        source.store.open(*source.key)
    again = source.model_copy(update={"settings": {**source.settings, "says": says}})
    assert run_stage(again, threading.Event()) is Outcome.FINISHED
    line = "source made anew since, with other bytes than this was made from"
    reasons = {stage.name: stage.reason for stage in plan_halves(source.outputs, "a", {"left": {}}).stages}
    told = [name for name, reason in reasons.items() if line in reason]
    assert told == ([] if says == "source" else ["left"])
    for command in ("verify", "status"):
        assert main([command, "a", "--outputs", str(source.outputs)]) == 0
        assert capsys.readouterr().out.replace("\n", " ").count("made anew since") == len(told)


def test_verify_names_what_is_damaged_and_takes_it_back_when_it_is_whole_again(source: FrozenStage, capsys):
    arguments = ["verify", "a", "--outputs", str(source.outputs)]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 3
    assert str(file_of(source)) in lines[0]
    assert all("whole (" in line for line in lines[1:])
    assert shown.err.startswith("unclip: 1 damaged")
    assert main(arguments) == 2
    file_of(source).write_text("source")
    capsys.readouterr()
    assert main([*arguments[:1], "--all", *arguments[2:]]) == 0
    assert "taken back" in capsys.readouterr().out
    assert source.store.open(*source.key) is not None
