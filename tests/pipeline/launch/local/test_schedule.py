"""Stages side by side, in real processes: what is shared, what is skipped, and how all of them are stopped."""

import io
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from pipeline.launch.local import LAUNCHER
from pipeline.terminal.display import Display
from pipeline.workflow.causes import Cause
from pipeline.workflow.plan import Plan, PlannedStage
from pipeline.workflow.progress import Outcome, read_failure
from tests.support import ROOT, world
from tests.support.command import said
from tests.support.halves import plan_halves, starts

PROGRAM = """
import sys
from pathlib import Path
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from tests.support.halves import plan_halves
never = {"left": {"meets": ["never"]}, "right": {"meets": ["never"]}}
outcomes = start([plan_halves(Path(sys.argv[1]), "trial", never)], Display(), waits=True)
print(sorted(f"{each.stage} {each.outcome.value}" for each in outcomes))
"""


@pytest.fixture(autouse=True)
def _workers_find_the_stages_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pipeline.launch.local.cores_here", lambda: 6)


def test_members_run_side_by_side_share_a_stage_and_a_failure_takes_its_own_descendants_alone(tmp_path: Path):
    text = io.StringIO()
    plans = [
        plan_halves(tmp_path, "a", {"left": {"meets": ["right"], "fails": True}}),
        plan_halves(tmp_path, "b", {"right": {"meets": ["left"]}}),
    ]
    outcomes = LAUNCHER.submit(plans, Display(Console(file=text, width=200)))
    assert {(each.run, each.stage): each.outcome for each in outcomes} == {
        ("a", "source"): Outcome.FINISHED,
        ("a", "left"): Outcome.FAILED,
        ("a", "end"): Outcome.SKIPPED,
        ("b", "right"): Outcome.FINISHED,
        ("b", "end"): Outcome.FINISHED,
    }
    # Each once, and each place with its share of the cores.
    assert starts(tmp_path) == {"source": ["3"], "left": ["3"], "right": ["3"], "end-b": ["3"]}
    lines = text.getvalue().splitlines()
    assert "b [1/3] source  shared with run a" in lines
    assert "a [2/3] left  FAILED: left was to fail" in lines
    assert "a [3/3] end  skipped: left did not finish" in lines


def test_what_is_to_be_first_starts_first_and_what_is_wide_has_the_cores_of_its_places(tmp_path: Path):
    text = io.StringIO()
    plan = plan_halves(tmp_path, "a", {"left": {}, "right": {}})
    stages = with_trainer(plan, cpu_threads=None)
    launch = {"kind": "local", "max_parallel": 3, "first": ["right"], "places": {"left": 2, "end": 9}}
    config = plan.config.model_copy(update={"launch": launch})
    outcomes = LAUNCHER.submit([replace(plan, config=config, stages=stages)], Display(Console(file=text, width=200)))
    assert {each.outcome for each in outcomes} == {Outcome.FINISHED}
    assert starts(tmp_path) == {"source": ["2"], "left": ["4"], "right": ["2"], "end-a": ["6"]}
    lines = [line.partition("  runs")[0] for line in text.getvalue().splitlines() if "  runs" in line]
    assert lines == ["[1/4] source", "[3/4] right", "[2/4] left", "[4/4] end"]


def with_trainer(plan: Plan, **settings: Any) -> tuple[PlannedStage, ...]:
    """The stages of a plan with other settings of their trainer."""
    frozen = [each.frozen for each in plan.stages if each.frozen is not None]
    changed = [each.model_copy(update={"trainer": each.trainer.model_copy(update=settings)}) for each in frozen]
    return tuple(replace(each, frozen=one) for each, one in zip(plan.stages, changed, strict=True))


def test_a_stage_whose_folder_cannot_be_written_takes_its_own_descendants_alone(tmp_path: Path):
    text, plan = io.StringIO(), plan_halves(tmp_path, "a", {"left": {}, "right": {}})
    (left,) = (each.frozen for each in plan.stages if each.name == "left")
    assert left is not None
    left.work.mkdir(parents=True)
    (left.work / "frozen").write_bytes(b"")  # in the way, for root too
    ended = {each.stage: each for each in LAUNCHER.submit([plan], Display(Console(file=text, width=300)))}
    assert {name: each.outcome.value for name, each in ended.items()} == {
        "source": "finished", "left": "failed", "right": "finished", "end": "skipped"
    }  # fmt: skip
    failure = ended["left"].failure
    assert failure is not None
    assert failure.is_user_error
    assert f"{left.work / 'frozen'}'; move away what is in the way, and run again" in text.getvalue()


@pytest.mark.slow
def test_a_stage_that_fails_starts_again_as_often_as_its_cause_is_given(tmp_path: Path):
    text = io.StringIO()

    def outcomes(suffers: str, times: int) -> list[Outcome]:
        launch = {"max_parallel": 1, "retries": {"collective": times}}
        plan = world.plan(tmp_path, suffers=suffers, steps=1, is_local=True, launch=launch)
        ended = LAUNCHER.submit([plan], Display(Console(file=text, width=200)))
        return [each.outcome for each in ended if each.stage == "sufferer"]

    assert outcomes("connection", 1) == [Outcome.FAILED]
    assert outcomes("connection", 1) == [Outcome.FINISHED]
    assert outcomes("kill", 1) == [Outcome.FAILED]
    lines = [line for line in text.getvalue().splitlines() if "sufferer" in line]
    assert any("collective: RuntimeError: Connection closed by peer; starts again (1 of 1)" in line for line in lines)
    assert any("FAILED: its process ended by SIGKILL and without a word; see the log" in line for line in lines)
    kept = map(read_failure, (tmp_path / "work" / "sufferer").iterdir())
    assert [each.message for each in kept if each] == ["its process ended by SIGKILL and without a word; see the log"]


def running(outputs: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A command that is at two stages, which would never end, and their processes."""
    command = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(outputs)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 120
    while not all((outputs / "starts" / name).exists() for name in ("left", "right")):
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < until, "the stages did not start in time"
        time.sleep(0.05)
    return command, psutil.Process(command.pid).children()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_all_that_run_and_nothing_more_is_started(tmp_path: Path, number: signal.Signals):
    command, workers = running(tmp_path)
    assert len(workers) == 2
    command.send_signal(number)
    text = command.communicate(timeout=60)[0]
    assert text.splitlines()[-1] == "['left interrupted', 'right interrupted', 'source finished']", text
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_cancel_has_the_command_of_this_machine_checkpoint_and_stop(tmp_path: Path):
    command, workers = running(tmp_path)
    at = ["--outputs", str(tmp_path)]
    assert said("cancel", "trial", *at) == f"trial: process {command.pid} was asked to write a checkpoint and stop\n"
    text = command.communicate(timeout=60)[0]
    assert text.splitlines()[-1] == "['left interrupted', 'right interrupted', 'source finished']", text
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert said("cancel", "trial", *at) == "trial is nowhere at work\n"


@pytest.mark.slow
def test_a_stage_whose_process_was_stopped_is_ended_and_what_is_known_of_it_kept(tmp_path: Path):
    text, plan = io.StringIO(), plan_halves(tmp_path, "a", {"left": {"meets": ["never"]}})
    stages = with_trainer(plan, hang_after_s=3.0, lease_s=1.0)
    has_ended = threading.Event()
    stopper = threading.Thread(target=stop_the_worker_of, args=(tmp_path, "left", has_ended), daemon=True)
    stopper.start()
    LAUNCHER.submit([replace(plan, stages=stages)], Display(Console(file=text, width=300)))
    has_ended.set()
    stopper.join()
    assert "left  FAILED (collective): stage left: nothing was heard of its process for 3 s, and it" in text.getvalue()
    (work,) = (tmp_path / "work" / "left").iterdir()
    failure = read_failure(work)
    assert failure is not None
    assert failure.cause is Cause.COLLECTIVE


def stop_the_worker_of(outputs: Path, stage: str, has_ended: threading.Event) -> None:
    while not (outputs / "starts" / stage).exists():
        if has_ended.wait(0.05):
            return
    for worker in psutil.Process().children():
        worker.suspend()


@pytest.mark.slow
def test_a_killed_command_leaves_no_stage_running(tmp_path: Path):
    command, workers = running(tmp_path)
    command.kill()
    command.communicate()
    assert not psutil.wait_procs(workers, timeout=60)[1]
