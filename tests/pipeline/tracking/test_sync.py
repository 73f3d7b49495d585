import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import wandb

from pipeline.config import TrackingMode
from pipeline.errors import UserError
from pipeline.tracking.sending import start_sender
from pipeline.tracking.sync import Synced, main, sync
from pipeline.tracking.wandb_record import WANDB, read_record, write_record
from pipeline.tracking.wandb_run import Ending
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import MANIFEST
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import Outcome, read_failure
from pipeline.workflow.record import AXIS, METRICS, append, read_standing
from tests.support import tiny
from tests.support.tiny import SCRIPT, rows, run
from tests.support.tracked import ALL, UNREACHABLE, again, at_40, crash, is_long_ago, start, stop, tracked, wait_until
from tests.support.wandb_server import Health, WandbServer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> FrozenStage:
    """A stage that nothing disturbed, tracked offline."""
    stage = tracked(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in UNREACHABLE.items():
            patch.setenv(name, value)
        assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    return stage


def copied(stage: FrozenStage, outputs: Path) -> FrozenStage:
    """The same under other outputs, whose files a test may change."""
    shutil.copytree(stage.outputs, outputs)
    return stage.model_copy(update={"outputs": outputs})


def cut(rows: Path) -> None:
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:2]))


def behead(rows: Path) -> None:
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[2:]))


def require_every_row_once(server: WandbServer) -> None:
    assert server.only_run.axis("train/loss") == ALL
    assert [row["_step"] for row in server.only_run.rows] == list(range(len(server.only_run.rows)))


def test_what_is_sent_is_sent_once(tmp_path: Path, trained: FrozenStage, server: WandbServer):
    stage = copied(trained, tmp_path / "outputs")
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    assert sync([stage.work], server.address) == Synced()
    require_every_row_once(server)
    assert server.only_run.ended_with == [0]


def test_a_line_that_a_kill_tore_is_sent_when_it_is_whole(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    assert run(stage) is Outcome.FAILED
    with (stage.work / "metrics.jsonl").open("a") as file:
        file.write('{"samples_seen": 64, "train/lo')
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == ALL[:7]
    assert again(stage) is Outcome.FINISHED
    sync([stage.work], server.address)
    require_every_row_once(server)
    assert server.only_run.ended_with == [1, 0]


@pytest.mark.parametrize("arrived", [0, 1, 6, 11])
def test_sending_that_was_cut_off_is_gone_on_with_and_no_row_is_there_twice(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, arrived: int
):
    """The server has the first rows, the client was not told so, and is killed."""
    stage = copied(trained, tmp_path / "outputs")
    server.rows_to_take = arrived
    sender = start_sender(stage, Ending.FINISHED)
    wait_until(lambda: server.health is Health.BROKEN)
    os.killpg(sender.pid, signal.SIGKILL)
    sender.wait()
    server.rows_to_take, server.health = None, Health.WELL
    assert len(server.only_run.rows) == arrived
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    require_every_row_once(server)
    assert server.only_run.ended_with == [0]


@pytest.mark.slow
def test_of_a_stage_that_was_killed_the_rows_are_sent_and_no_end(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, step_s=0.5)
    assert run_stage(tiny.data_of(stage), Event()) is Outcome.FINISHED
    process = start(stage)
    wait_until(lambda: len(rows(stage)) >= 3)
    process.kill()
    process.wait()
    is_long_ago(stage)
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    assert server.only_run.axis("train/loss") == ALL[: len(rows(stage))]
    assert server.only_run.ended_with == []
    assert sync([stage.work], server.address) == Synced()
    assert again(stage) is Outcome.FINISHED
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    require_every_row_once(server)
    assert server.only_run.ended_with == [0]


def test_a_failure_does_not_keep_other_stages_from_the_server(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    one, other = copied(trained, tmp_path / "one"), copied(trained, tmp_path / "other")
    shutil.rmtree(one.work / "frozen")
    with pytest.raises(UserError, match="has no frozen stage"):
        sync([one.work, other.work], server.address)
    require_every_row_once(server)
    assert f"error: {one.work} has no frozen stage" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"{"), lambda path: path.unlink()])
def test_a_lost_record_of_a_finished_stage_is_told_anew_from_its_artifact(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, damage: Callable[[Path], None]
):
    stage = copied(trained, tmp_path / "outputs")
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    before = read_record(stage.work)
    damage(stage.work / WANDB)
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    after = read_record(stage.work)
    assert before is not None
    assert after is not None
    assert (after.id, after.name, after.project) == (before.id, before.name, before.project)
    require_every_row_once(server)
    assert sync([stage.work], server.address) == Synced()


def test_a_stage_whose_artifact_is_damaged_does_not_keep_others_from_the_server(
    tmp_path: Path, trained: FrozenStage, server: WandbServer
):
    one, other = copied(trained, tmp_path / "one"), copied(trained, tmp_path / "other")
    (one.store.path(*one.key) / MANIFEST).write_bytes(b"")
    is_long_ago(one)
    assert sync([one.work, other.work], server.address) == Synced(sent=[one.work, other.work])
    require_every_row_once(server)
    assert server.only_run.ended_with == [0]  # of the other


@pytest.mark.parametrize("lose", [Path.unlink, cut, behead, lambda path: path.write_bytes(b"")])
def test_a_finished_stage_that_lost_its_rows_is_told_with_those_of_its_artifact(
    tmp_path: Path,
    trained: FrozenStage,
    server: WandbServer,
    capsys: pytest.CaptureFixture[str],
    lose: Callable[[Path], object],
):
    stage = copied(trained, tmp_path / "outputs")
    lose(stage.work / METRICS)
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    assert f"{stage.work / METRICS} was lost or damaged; its rows are taken from" in capsys.readouterr().out
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with == [0]
    assert sync([stage.work], server.address) == Synced()


def test_a_finished_stage_that_lost_its_rows_is_not_told_as_one_without_any(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    stage = copied(trained, tmp_path / "outputs")
    record = read_record(stage.work)
    assert record is not None
    write_record(stage.work, replace(record, sent=3))
    (stage.work / METRICS).unlink()
    kept = stage.store.path(*stage.key) / METRICS
    remedy = f"or remove {stage.work / WANDB} to leave the stage out, whose rows are in {kept}"
    with pytest.raises(
        UserError, match=f"metrics.jsonl is gone or cut, of which W&B has 3 entries; put it back, {remedy}"
    ):
        sync([stage.work], server.address)
    (stage.work / WANDB).unlink()
    assert sync([stage.work], server.address) == Synced()
    assert f"metrics.jsonl is gone or damaged; the stage's rows are in {kept}" in capsys.readouterr().out
    assert server.runs == {}


def test_pictures_that_are_known_stay_where_rows_are_taken_from_the_artifact(
    tmp_path: Path, trained: FrozenStage, server: WandbServer
):
    stage = copied(trained, tmp_path / "outputs")
    rows = read_standing(stage.work)
    picture = {"picture": "samples", AXIS: rows[0][AXIS], "file": "gone.png", "captions": ["a"]}
    append(stage.work, picture)
    content = (stage.work / METRICS).read_bytes()
    (stage.work / METRICS).write_bytes(content.replace(b'"', b"!", 1))
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    assert read_standing(stage.work) == [rows[0], picture, *rows[1:]]
    assert server.only_run.axis("train/loss") == ALL


def test_rows_that_are_lost_after_all_was_sent_are_said_and_nothing_is_sent_again(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    stage = copied(trained, tmp_path / "outputs")
    assert sync([stage.work], server.address) == Synced(sent=[stage.work])
    (stage.work / METRICS).write_bytes(b"")
    assert sync([stage.work], server.address) == Synced()
    assert f"{stage.work / METRICS} is gone or damaged; W&B has all of it" in capsys.readouterr().out
    assert server.only_run.ended_with == [0]


def test_rows_that_are_cut_after_a_stopped_start_was_told_of_are_not_told_as_all(
    tmp_path: Path, trained: FrozenStage, server: WandbServer
):
    stage = copied(trained, tmp_path / "outputs")
    record = read_record(stage.work)
    assert record is not None
    write_record(stage.work, replace(record, sent=1, told=Ending.INTERRUPTED.value))
    cut(stage.work / METRICS)
    with pytest.raises(UserError, match=r"metrics.jsonl is gone or cut, of which W&B has 1 entries"):
        sync([stage.work], server.address)
    assert server.runs == {}


def test_a_damaged_frozen_stage_is_as_one_that_is_lost(tmp_path: Path, trained: FrozenStage, server: WandbServer):
    stage = copied(trained, tmp_path / "outputs")
    for file in (stage.work / "frozen").glob("*.json"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"no frozen stage that can be read, .*remove {stage.work / WANDB} to leave"):
        sync([stage.work], server.address)
    assert server.runs == {}


def test_of_a_stage_that_was_made_elsewhere_nothing_is_said(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    """As of one that was pulled."""
    stage = copied(trained, tmp_path / "outputs")
    shutil.rmtree(stage.work)
    stage.work.mkdir()
    assert sync([stage.work], server.address) == Synced()
    assert capsys.readouterr().out == ""


def test_sync_of_what_is_no_directory_says_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is nothing at .*/nowhere; give the --outputs of your runs"):
        main(["--outputs", str(tmp_path / "nowhere")])


def test_a_stage_at_work_is_left_for_later(tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]):
    stage = tracked(tmp_path)
    found: list[Synced] = []
    at_40(lambda _context: found.append(sync([stage.work], server.address)))
    assert run(stage) is Outcome.FINISHED
    assert found == [Synced(left=[stage.work])]
    assert server.runs == {}


def test_without_a_server_sync_says_so_in_a_line(trained: FrozenStage, monkeypatch: pytest.MonkeyPatch):
    wandb.teardown()  # it keeps the address of the server that it first knew
    with pytest.raises(UserError, match=r"^the W&B server http://127.0.0.1:9 is not reached .*; nothing was uploaded"):
        main(["--outputs", str(trained.outputs)])
    record = read_record(trained.work)
    assert record is not None
    assert (record.sent, record.told) == (0, None)


def test_sync_of_a_server_in_trouble_says_so_and_leaves_nothing_in_the_working_directory(
    tmp_path: Path,
    trained: FrozenStage,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    wandb.teardown()
    stage = copied(trained, tmp_path / "outputs")
    server.health = Health.BROKEN
    with pytest.raises(UserError, match=r"is not reached .*500.*; nothing was uploaded"):
        main(["--outputs", str(stage.outputs)])
    server.health = Health.WELL
    assert main(["--outputs", str(stage.outputs)]) == 0
    require_every_row_once(server)
    assert "uploading sweep.1/learner" in capsys.readouterr().out
    assert main(["--outputs", str(stage.outputs)]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_a_client_that_w_and_b_refuses_is_a_line_and_marks_nothing(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    """W&B's own client, without a key."""
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    stage = copied(trained, tmp_path / "outputs")
    with pytest.raises(UserError, match=r"learner was not uploaded: .*; see `wandb login`, then run this again"):
        sync([stage.work], server.address)
    record = read_record(stage.work)
    assert record is not None
    assert (record.sent, record.told) == (0, None)


def test_what_an_earlier_version_kept_in_w_and_b_s_own_files_is_named_with_the_remedy(
    tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    work = tmp_path / "work" / "clip" / "0123"
    log = work / "wandb" / "offline-run-20250101_000000-abc" / "run-abc.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"of W&B's")
    (work / "wandb.json").write_text('{"id": "abc", "project": "p", "entity": null, "group": "g", "name": "n"}')
    assert main(["--outputs", str(tmp_path)]) == 0
    assert f"`wandb sync {log.parent}` uploads it" in capsys.readouterr().out
    log.with_suffix(".wandb.synced").touch()
    assert main(["--outputs", str(tmp_path)]) == 0
    assert "wandb sync" not in capsys.readouterr().out


def test_a_stage_that_was_stopped_is_known_to_be(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, TrackingMode.OFFLINE)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == [row["samples_seen"] for row in rows(stage)]
    assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)
