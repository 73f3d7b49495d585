"""Stages whose record is sent while they train, to a server that may be ill, by processes that may be killed."""

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import psutil
import pytest

from pipeline.config import TrackingMode
from pipeline.tracking import sending
from pipeline.tracking.sending import Sending
from pipeline.tracking.sync import Synced, sync
from pipeline.tracking.wandb_run import Ending
from pipeline.training.context import StageContext
from pipeline.training.stage import run_stage
from pipeline.workflow.ownership import ATTEMPTS
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure
from pipeline.workflow.record import entries
from tests.support import tiny
from tests.support.tiny import SCRIPT, run
from tests.support.tracked import ALL, again, at_40, is_long_ago, no_secret_below, start, stop, tracked, wait_until
from tests.support.wandb_server import Health, WandbServer

ONLINE = TrackingMode.ONLINE


def senders() -> list[psutil.Process]:
    """The sending processes of this one, and W&B's own below them."""
    own = [each for each in psutil.Process().children() if "pipeline.tracking.sender" in each.cmdline()]
    return [process for each in own for process in (*each.children(recursive=True), each)]


def require_every_row_once(server: WandbServer, every: Sequence[float]) -> None:
    assert server.only_run.axis("train/loss") == list(every)
    assert [row["_step"] for row in server.only_run.rows] == list(range(len(server.only_run.rows)))


def test_a_run_is_at_the_server_with_its_rows_summary_and_end_and_the_key_is_in_no_file(
    tmp_path: Path, server: WandbServer
):
    stage = tracked(tmp_path, ONLINE, sample_every_samples=40)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    at_server = server.only_run
    require_every_row_once(server, ALL)
    assert at_server.axis("samples") == [40, 80]
    assert at_server.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert (at_server.ended_with, at_server.preempted) == ([0], 0)
    assert any(server.secrets)  # it was asked for, and sent
    assert sync([stage.work], server.address) == Synced()
    no_secret_below(tmp_path)


def test_rows_are_at_the_server_while_the_stage_trains(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, ONLINE)
    at_40(lambda _context: wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) == 5))
    assert run(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)


def test_a_stopped_run_goes_on_at_the_server(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, ONLINE)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)
    assert again(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [75, 0]


@pytest.mark.slow
@pytest.mark.parametrize("health", [Health.BROKEN, Health.SILENT])
def test_rows_that_an_outage_kept_back_are_sent_by_the_next_start(
    tmp_path: Path,
    server: WandbServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    health: Health,
):
    stage = tracked(tmp_path, ONLINE)

    def fall_ill(context: StageContext) -> None:
        wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 2)
        server.health = health
        context.interruption.set()

    at_40(fall_ill)
    with monkeypatch.context() as patch:
        patch.setattr(sending, "_SECONDS_TO_UPLOAD_AT_A_STOP", 3.0)
        assert run(stage) is Outcome.INTERRUPTED
    assert f"it is kept in {stage.work}, and `unclip sync` sends what is missing" in capfd.readouterr().out
    assert senders() == []
    server.health = Health.WELL
    assert 2 <= len(server.only_run.rows) < 6
    assert again(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)


def test_an_outage_in_the_middle_is_over_before_the_end_and_nobody_has_to_do_anything(
    tmp_path: Path, server: WandbServer
):
    stage = tracked(tmp_path, ONLINE)

    def toggle(context: StageContext) -> None:
        if context.tracker.wandb_record is not None and SCRIPT.seen:
            server.health = {3: Health.BROKEN, 7: Health.WELL}.get(len(SCRIPT.seen), server.health)

    SCRIPT.every_step = toggle
    assert run(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [0]


def test_what_an_outage_kept_back_to_the_end_is_sent_by_sync_once(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    stage = tracked(tmp_path, ONLINE, sample_every_samples=40)
    at_40(lambda _context: setattr(server, "health", Health.BROKEN))
    with monkeypatch.context() as patch:
        patch.setattr(sending, "_SECONDS_TO_UPLOAD_THE_REST", 3.0)
        assert run(stage) is Outcome.FINISHED
    server.health = Health.WELL
    assert all(run.ended_with == [] for run in server.runs.values())
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    require_every_row_once(server, ALL)
    assert server.only_run.axis("samples") == [40, 80]
    assert server.only_run.ended_with == [0]
    assert server.only_run.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert sync([stage.work], server.address) == Synced()


@pytest.mark.slow
def test_rows_that_arrived_are_not_sent_again_where_the_sender_was_killed(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, ONLINE)

    def kill(_context: StageContext) -> None:
        wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 3)
        for process in senders():
            process.kill()

    at_40(kill)
    assert run(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [0]


@pytest.mark.slow
def test_a_sender_that_was_killed_is_started_again_while_the_stage_trains(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sending, "_SECONDS_BETWEEN_STARTS", 0.0)
    stage = tracked(tmp_path, ONLINE, step_s=0.1, max_samples=8000)
    run_stage(tiny.data_of(stage), Event())
    interruption = Event()
    counts: list[int] = []

    def look(context: StageContext) -> None:
        if len(SCRIPT.seen) == 2:
            wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 1)
            for process in senders():
                process.kill()
            counts.append(len(server.only_run.rows))
        elif counts and len(server.only_run.rows) > counts[0]:
            interruption.set()

    SCRIPT.every_step = look
    assert run_stage(stage, interruption) is Outcome.INTERRUPTED
    seen = [row["samples_seen"] for row in tiny.rows(stage)]
    assert seen[-1] < 8000
    require_every_row_once(server, seen)


@pytest.mark.slow
def test_a_killed_run_has_every_row_once_at_the_server(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, ONLINE, step_s=0.04, max_samples=960, checkpoint_every_samples=240)
    run_stage(tiny.data_of(stage), Event())
    process = start(stage)
    wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 480)
    # Slurm's last signal comes to all processes.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    assert start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
    require_every_row_once(server, list(range(8, 961, 8)))
    assert server.only_run.ended_with == [0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kills_and_outages_at_any_moment_leave_every_row_once_and_in_order(
    tmp_path: Path, server: WandbServer, seed: int
):
    """Now the stage's process alone is killed, now all of them, now the server falls ill or is well again."""
    chance = random.Random(seed)
    every = list(range(8, 8001, 8))
    stage = tracked(tmp_path, ONLINE, step_s=0.02, max_samples=8000, checkpoint_every_samples=160)
    run_stage(tiny.data_of(stage), Event())
    for _ in range(3):
        before = len(tiny.rows(stage))
        process = start(stage)
        wait_until(lambda before=before: len(tiny.rows(stage)) > before)
        time.sleep(chance.uniform(0.0, 3.0))
        server.health = chance.choice([Health.WELL, Health.WELL, Health.BROKEN])
        time.sleep(chance.uniform(0.0, 1.5))
        victims = [*psutil.Process(process.pid).children(recursive=True)] if chance.random() < 0.5 else []
        for each in [*victims, psutil.Process(process.pid)]:
            each.kill()
        process.wait()
        server.health = Health.WELL
        if chance.random() < 0.5:
            is_long_ago(stage)
            sync([stage.work], server.address)
    assert start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
    sync([stage.work], server.address)
    require_every_row_once(server, every)
    assert sync([stage.work], server.address) == Synced()
    assert [row["samples_seen"] for row in tiny.rows(stage) if "train/loss" in row] == every


@pytest.mark.slow
def test_a_signal_to_all_processes_loses_neither_rows_nor_the_state(tmp_path: Path, server: WandbServer):
    """Slurm's way to stop a job. W&B's own process does not outlive the signal."""
    stage = tracked(tmp_path, ONLINE, step_s=0.1, max_samples=8000)
    run_stage(tiny.data_of(stage), Event())
    process = start(stage)
    wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name().startswith("wandb-core") for child in children)
    for each in (*children, process):
        each.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, (stage.work / "log.txt").read_text()
    is_long_ago(stage)
    sync([stage.work], server.address)  # where this machine is too slow for the ten seconds that a stop has
    require_every_row_once(server, [row["samples_seen"] for row in tiny.rows(stage)])
    assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)


def test_a_stopped_job_is_told_of_before_the_server_has_everything(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "interrupted"
    monkeypatch.setenv("UNCLIP_LAUNCHED_BY", "slurm")
    monkeypatch.setenv("UNCLIP_INTERRUPTED", str(marker))
    was_there: list[bool] = []
    finish = Sending.finish

    def noting(self: Sending, ending: Ending) -> None:
        was_there.append(marker.exists())
        finish(self, ending)

    monkeypatch.setattr(Sending, "finish", noting)
    stage = tracked(tmp_path, ONLINE)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    assert was_there == [True]


def test_a_process_that_lost_the_stage_says_nothing_of_it_to_the_server(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, ONLINE)

    def lose(context: StageContext) -> None:
        wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 1)
        (context.frozen.work / ATTEMPTS / "000002.json").write_text("{}")
        context.interruption.set()

    at_40(lose)
    assert run(stage) is Outcome.INTERRUPTED
    assert (server.only_run.ended_with, server.only_run.preempted) == ([], 0)
    assert senders() == []


def test_an_online_start_after_an_offline_one_sends_the_rows_of_both_in_order(tmp_path: Path, server: WandbServer):
    at_40(stop)
    assert run(tracked(tmp_path, TrackingMode.OFFLINE)) is Outcome.INTERRUPTED
    assert server.runs == {}
    stage = tracked(tmp_path, ONLINE)
    assert again(stage) is Outcome.FINISHED
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [0]
    assert server.only_run.summary["samples_seen"] == 80


@pytest.mark.slow
def test_an_offline_start_after_an_outage_is_sent_after_what_the_outage_kept_back(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    stage = tracked(tmp_path, ONLINE)

    def fall_ill(context: StageContext) -> None:
        wait_until(lambda: len(server.runs) == 1 and len(server.only_run.rows) >= 2)
        server.health = Health.BROKEN
        context.interruption.set()

    at_40(fall_ill)
    with monkeypatch.context() as patch:
        patch.setattr(sending, "_SECONDS_TO_UPLOAD_AT_A_STOP", 3.0)
        assert run(stage) is Outcome.INTERRUPTED
    server.health = Health.WELL
    assert again(tracked(tmp_path, TrackingMode.OFFLINE)) is Outcome.FINISHED
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [0]
    assert sync([stage.work], server.address) == Synced()


@pytest.mark.parametrize("mode", [TrackingMode.ONLINE, TrackingMode.OFFLINE])
def test_the_run_of_a_stage_that_was_killed_just_after_it_published_is_finished_by_sync(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, mode: TrackingMode
):
    stage = tracked(tmp_path, mode)
    with monkeypatch.context() as patch:
        patch.setattr(Sending, "finish", lambda self, _ending: self.abandon())
        assert run(stage) is Outcome.FINISHED
    assert all(run.ended_with == [] for run in server.runs.values())
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    require_every_row_once(server, ALL)
    assert server.only_run.ended_with == [0]
    assert server.only_run.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert server.artifacts[-1]["artifactCollectionName"] == f"learner-{tiny.LEARNER[:12]}"
    assert sync([stage.work], server.address) == Synced()


@pytest.mark.slow
def test_rows_that_are_logged_more_rarely_after_a_kill_are_neither_lost_nor_there_twice(
    tmp_path: Path, server: WandbServer
):
    """What was superseded is at the server already; what takes its place has other numbers of samples."""
    SCRIPT.at_samples, SCRIPT.happens = 56, lambda _context: (_ for _ in ()).throw(RuntimeError("killed"))
    stage = tracked(tmp_path, ONLINE, checkpoint_every_samples=32)
    assert run(stage) is Outcome.FAILED
    assert again(tracked(tmp_path, ONLINE, checkpoint_every_samples=32, log_every_steps=3)) is Outcome.FINISHED
    assert [row["samples_seen"] for row in tiny.rows(stage) if "train/loss" in row] == [8, 16, 24, 32, 48, 72, 80]
    require_every_row_once(server, [8, 16, 24, 32, 40, 48, 56, 72, 80])
    record = stage.work / "metrics.jsonl"
    assert {"resumes_at": 32} in entries(record.read_bytes().splitlines(), record)
