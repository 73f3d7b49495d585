import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.terminal.display import Display
from pipeline.terminal.words import format_duration, progress_line
from pipeline.workflow.plan import plan_run
from pipeline.workflow.progress import Failure, Outcome, Phase, Progress
from tests.support.fakes import plan, run_config


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (8.4, "8 s"), (59.6, "1:00"), (125, "2:05"), (3599.7, "1:00:00"), (3723, "1:02:03")],
)
def test_durations_read_as_clocks(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_a_progress_line_has_the_counter_rate_loss_and_time_left():
    progress = Progress(Phase.WORKING, samples_seen=12_000, max_samples=96_000, samples_per_s=700, loss=0.125)
    assert progress_line(progress) == "12,000 / 96,000 samples · 700 samples/s · loss 0.1250 · 2:00 left"


def test_a_progress_line_of_what_has_stopped_says_nothing_of_what_it_did_last():
    stopped = Progress(Phase.INTERRUPTED, samples_seen=8, max_samples=16, activity="taking a checkpoint")
    assert progress_line(stopped) == "8 / 16 samples"


def test_a_progress_line_of_uncounted_work_says_what_goes_on():
    assert progress_line(Progress(Phase.WORKING, activity="unpacking")) == "unpacking"
    assert progress_line(Progress(Phase.STARTING)) == "starting"


def test_time_left_is_unknown_without_a_rate():
    assert Progress(Phase.WORKING, samples_seen=1, max_samples=2).time_left_s is None
    assert Progress(Phase.WORKING, samples_seen=30, max_samples=20, samples_per_s=1.0).time_left_s == 0


def test_a_run_without_a_terminal_prints_plain_lines_of_the_stages_that_run_side_by_side(tmp_path: Path):
    text = io.StringIO()
    display = Display(Console(file=text, highlight=False, force_terminal=False))
    stages = plan(tmp_path)
    display.start_run(plan_run(run_config(tmp_path)))
    display.reuse("[1/6] prepare", stages["prepare"])
    display.share("b [2/6] clip", "a")
    display.start("[2/6] clip", stages["clip"])
    display.start("[4/6] upsampler_1", stages["upsampler_1"])
    display.update("[4/6] upsampler_1", None)
    display.finish("[2/6] clip", stages["clip"], 61.0, Outcome.FINISHED)
    failure = Failure("[red] is no colour", is_user_error=True)
    display.finish("[4/6] upsampler_1", stages["upsampler_1"], 1.0, Outcome.FAILED, failure)
    display.wait("[3/6] decoder")
    display.skip("[6/6] evaluate", ["upsampler_1"])
    assert text.getvalue().splitlines() == [
        "run trial: 6 of 6 stages to do",
        "[1/6] prepare  reused, new",
        "b [2/6] clip  shared with run a",
        "[2/6] clip  runs (new)",
        "[4/6] upsampler_1  runs (new)",
        "[2/6] clip  done in 1:01",
        "[4/6] upsampler_1  FAILED: [red] is no colour",
        "[3/6] decoder  waits: another command works on it",
        "[6/6] evaluate  skipped: upsampler_1 did not finish",
    ]


def test_a_terminal_has_a_live_line_for_each_stage_that_runs(tmp_path: Path):
    text = io.StringIO()
    display = Display(Console(file=text, highlight=False, force_terminal=True, width=120))
    stages = plan(tmp_path)
    for name in ("clip", "decoder"):
        display.start(name, stages[name])
    for name, samples in (("clip", 3), ("decoder", 5)):
        display.update(name, Progress(Phase.WORKING, samples_seen=samples, max_samples=8))
    for name in ("clip", "decoder"):
        display.finish(name, stages[name], 1.0, Outcome.FINISHED)
    shown = text.getvalue()
    assert "clip  3 / 8 samples" in shown
    assert "decoder  5 / 8 samples" in shown


def test_a_failure_that_is_no_user_error_points_to_the_log(tmp_path: Path):
    text = io.StringIO()
    display = Display(Console(file=text, highlight=False, width=40))
    stage = plan(tmp_path)["clip"]
    display.start("clip", stage)
    display.finish("clip", stage, 1.0, Outcome.FAILED, Failure("RuntimeError: boom", is_user_error=False))
    assert stage.frozen is not None
    assert f"log: {stage.frozen.work / 'log.txt'}" in text.getvalue()


def test_an_interrupted_stage_says_that_it_resumes(tmp_path: Path):
    text = io.StringIO()
    display = Display(Console(file=text, highlight=False))
    stage = plan(tmp_path)["clip"]
    display.start("clip", stage)
    display.finish("clip", stage, 1.0, Outcome.INTERRUPTED)
    assert "clip  stopped; the same command resumes it" in text.getvalue()
