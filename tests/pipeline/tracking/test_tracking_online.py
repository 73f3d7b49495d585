import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import wandb
from pipeline.tracking.wandb_log import history

from pipeline.config import TrackingMode
from pipeline.errors import UserError
from pipeline.tracking import wandb_run, wandb_session
from pipeline.tracking.sync import Synced, main, sync
from pipeline.tracking.wandb_record import fragments, is_offline, read_record
from pipeline.tracking.wandb_run import Ending, WandbRun
from pipeline.training.context import StageContext
from pipeline.training.stage import run_stage
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.ownership import ATTEMPTS
from pipeline.workflow.progress import (
    SECONDS_UNTIL_SILENT,
    Outcome,
    latest_checkpoint_samples,
    read_failure,
    read_progress,
    write_progress,
)
from tests.support import tiny
from tests.support.tiny import SCRIPT, run
from tests.support.tracked import KEY, axis, no_secret_below, records, start, tracked, wait_until
from tests.support.wandb_server import Health, WandbServer, serving

ALL = list(range(8, 81, 8))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(wandb_run, "_SECONDS_TO_UPLOAD_AT_A_STOP", 2.0)
        monkeypatch.setattr(wandb_session, "_SECONDS_TO_UPLOAD_THE_REST", 3.0)
        wandb.teardown()  # it keeps the address of the server that it first knew
        yield server
        wandb_session.kill_session()
        wandb_session.forget_session()


def online(outputs: Path, mode: TrackingMode = TrackingMode.ONLINE, **settings: Any) -> FrozenStage:
    stage = tracked(outputs, mode, **settings)
    write_frozen(stage)
    return stage


def at_40(happens: Callable[[StageContext], None]) -> None:
    SCRIPT.at_samples, SCRIPT.happens = 40, happens


def stop(context: StageContext) -> None:
    context.interruption.set()


def again(stage: FrozenStage) -> Outcome:
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    return run(stage)


def test_a_run_is_at_the_server_with_its_rows_summary_and_end_and_the_key_is_in_no_file(
    tmp_path: Path, server: WandbServer
):
    stage = online(tmp_path, sample_every_samples=40)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    at_server = server.only_run
    assert at_server.axis("train/loss") == ALL
    assert at_server.axis("samples") == [40, 80]
    assert at_server.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert (at_server.ended_with, at_server.preempted) == ([0], 0)
    assert any(server.secrets)  # it was asked for, and sent
    no_secret_below(tmp_path)


def test_a_stopped_run_goes_on_at_the_server(tmp_path: Path, server: WandbServer):
    stage = online(tmp_path)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)
    assert again(stage) is Outcome.FINISHED
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with == [75, 0]


@pytest.mark.parametrize("health", [Health.BROKEN, Health.SILENT])
def test_rows_that_an_outage_kept_back_are_sent_by_the_next_start(
    tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str], health: Health
):
    stage = online(tmp_path)

    def fall_ill(context: StageContext) -> None:
        server.health = health
        context.interruption.set()

    at_40(fall_ill)
    assert run(stage) is Outcome.INTERRUPTED
    said = capfd.readouterr().out
    assert f"it is kept in {stage.work}, and `unclip sync` sends what is missing" in said
    server.health = Health.WELL
    assert len(server.only_run.rows) < 5
    assert again(stage) is Outcome.FINISHED
    assert server.only_run.axis("train/loss") == ALL


def test_what_an_outage_kept_back_to_the_end_is_sent_by_sync_once(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    stage = online(tmp_path, sample_every_samples=40)
    at_40(lambda _context: setattr(server, "health", Health.BROKEN))
    with monkeypatch.context() as patch:
        patch.setattr(WandbRun, "log_artifact", lambda *_: None)  # W&B tries it for 20 s
        assert run(stage) is Outcome.FINISHED
    server.health = Health.WELL
    assert server.only_run.ended_with == []
    _is_long_ago(stage)
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[], settled=1)
    at_server = server.only_run
    assert at_server.axis("train/loss") == ALL
    assert at_server.axis("samples") == [40, 80]
    assert at_server.ended_with == [0]
    assert at_server.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


def test_rows_that_arrived_and_that_a_kill_kept_from_the_log_are_not_sent_again(tmp_path: Path, server: WandbServer):
    stage = online(tmp_path, checkpoint_every_samples=16)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    at_server = len(server.only_run.rows)
    (log,) = fragments(stage.work)
    content = log.read_bytes()
    log.write_bytes(content[: content.index(b"train/loss") + 2000])
    assert 0 < len(list(history(log))) < at_server
    assert again(stage) is Outcome.FINISHED
    assert server.only_run.axis("train/loss") == ALL


@pytest.mark.slow
def test_a_killed_run_has_every_row_once_at_the_server(tmp_path: Path, server: WandbServer):
    stage = online(tmp_path, step_s=0.04, max_samples=960, checkpoint_every_samples=240, sample_every_samples=160)
    run_stage(tiny.data_of(stage), Event())
    process = start(stage)
    wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 480)
    # Slurm's last signal comes to all processes.
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    assert start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
    assert server.only_run.axis("train/loss") == list(range(8, 961, 8))
    assert server.only_run.axis("samples") == list(range(160, 961, 160))
    assert server.only_run.ended_with == [0]


@pytest.mark.parametrize("mode", [TrackingMode.ONLINE, pytest.param(TrackingMode.OFFLINE, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_loses_neither_rows_nor_the_state(
    tmp_path: Path, server: WandbServer, mode: TrackingMode
):
    """Slurm's way to stop a job."""
    stage = online(tmp_path, mode, step_s=0.1, max_samples=8000)
    run_stage(tiny.data_of(stage), Event())
    process = start(stage)
    wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 80)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name().startswith("wandb-core") for child in children)
    for each in (*children, process):
        each.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, (stage.work / "log.txt").read_text()
    seen = [row["samples_seen"] for row in tiny.rows(stage)]
    if mode is TrackingMode.ONLINE:
        assert server.only_run.axis("train/loss") == seen
        assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)
    else:
        assert axis(stage, "train/loss") == seen
        last = fragments(stage.work)[-1]
        assert [each["exit_code"] for each in records(last, "exit")] == [75]
        assert len(records(last, "preempting")) == 1


def test_a_stopped_job_is_told_of_before_the_server_has_everything(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "interrupted"
    monkeypatch.setenv("UNCLIP_INTERRUPTED", str(marker))
    was_there: list[bool] = []
    finish = WandbRun.finish

    def noting(self: WandbRun, ending: Ending) -> bool:
        was_there.append(marker.exists())
        return finish(self, ending)

    monkeypatch.setattr(WandbRun, "finish", noting)
    stage = online(tmp_path)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    assert was_there == [True]


def test_a_process_that_lost_the_stage_says_nothing_of_it_to_the_server(tmp_path: Path, server: WandbServer):
    stage = online(tmp_path)

    def lose(context: StageContext) -> None:
        (context.frozen.work / ATTEMPTS / "000002.json").write_text("{}")
        context.interruption.set()

    at_40(lose)
    assert run(stage) is Outcome.INTERRUPTED
    assert (server.only_run.ended_with, server.only_run.preempted) == ([], 0)
    assert not any(child.name().startswith("wandb-core") for child in psutil.Process().children())


def test_an_online_start_after_one_that_is_not_uploaded_keeps_to_files_until_sync(
    tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
):
    at_40(stop)
    assert run(tracked(tmp_path, TrackingMode.OFFLINE)) is Outcome.INTERRUPTED
    stage = online(tmp_path)
    assert again(stage) is Outcome.FINISHED
    assert "an earlier start is not uploaded yet, so this one is kept in files too" in capfd.readouterr().out
    assert server.runs == {}
    assert all(is_offline(log) for log in fragments(stage.work))
    assert sync([stage.work], server.address).uploaded == 2
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with == [75, 0]
    assert server.only_run.summary["samples_seen"] == 80


def test_a_start_offline_after_an_outage_is_uploaded_after_what_the_outage_kept_back(
    tmp_path: Path, server: WandbServer
):
    stage = online(tmp_path)

    def fall_ill(context: StageContext) -> None:
        server.health = Health.BROKEN
        context.interruption.set()

    at_40(fall_ill)
    assert run(stage) is Outcome.INTERRUPTED
    server.health = Health.WELL
    assert again(tracked(tmp_path, TrackingMode.OFFLINE)) is Outcome.FINISHED
    assert sync([stage.work], server.address) == Synced(uploaded=1, left=[], settled=1)
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with == [0]
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


@pytest.mark.parametrize("mode", [TrackingMode.ONLINE, TrackingMode.OFFLINE])
def test_the_run_of_a_stage_that_was_killed_just_after_it_published_is_finished_by_sync(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, mode: TrackingMode
):
    stage = online(tmp_path, mode)
    with monkeypatch.context() as patch:
        patch.setattr(WandbRun, "log_artifact", lambda self, _artifact: self.abandon())
        assert run(stage) is Outcome.FINISHED
    record = read_record(stage.work)
    assert record is not None
    assert record.open_fragment is not None
    _is_long_ago(stage)
    assert sync([stage.work], server.address).settled == 1
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with == [0]
    assert server.only_run.summary["loss"] == tiny.finished(stage).manifest.metrics["loss"]
    assert server.artifacts[-1:] == [f"learner-{tiny.LEARNER[:12]}"]
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


def test_sync_of_a_server_in_trouble_says_so_and_leaves_nothing_in_the_working_directory(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    stage = online(tmp_path / "outputs", TrackingMode.OFFLINE)
    assert run(stage) is Outcome.FINISHED
    server.health = Health.BROKEN
    with pytest.raises(UserError, match=r"is not reached .*500.*; nothing was uploaded"):
        main(["--outputs", str(stage.outputs)])
    server.health = Health.WELL
    assert main(["--outputs", str(stage.outputs)]) == 0
    assert server.only_run.axis("train/loss") == ALL
    assert "uploading offline-run-" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def _is_long_ago(stage: FrozenStage) -> None:
    progress = read_progress(stage.work)
    assert progress is not None
    write_progress(stage.work, replace(progress, updated_at=time.time() - 2 * SECONDS_UNTIL_SILENT))
