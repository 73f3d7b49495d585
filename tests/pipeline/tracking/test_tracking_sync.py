import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import wandb
from pipeline.tracking.wandb_log import cut_to_whole_records, history

from pipeline.errors import UserError
from pipeline.tracking import sync as sync_module
from pipeline.tracking import wandb_session
from pipeline.tracking.sync import Synced, main, sync
from pipeline.tracking.wandb_record import fragments, mark_of, read_record, write_record
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import SECONDS_UNTIL_SILENT, Outcome, read_failure, read_progress, write_progress
from tests.support.tiny import SCRIPT, run
from tests.support.tracked import UNREACHABLE, records, tracked
from tests.support.wandb_server import WandbServer, serving

ALL = list(range(8, 81, 8))


@pytest.fixture(autouse=True)
def _a_key_and_no_network(monkeypatch: pytest.MonkeyPatch):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        wandb.teardown()  # it keeps the address of the server that it first knew
        yield server
        wandb_session.kill_session()
        wandb_session.forget_session()


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
    copy = stage.model_copy(update={"outputs": outputs})
    write_frozen(copy)
    return copy


def tear(log: Path) -> None:
    """Take from a log what a kill would have kept from being written: its end, in the middle of a record."""
    log.write_bytes(log.read_bytes()[:-300])


def test_a_log_that_a_kill_tore_is_uploaded_once_and_marked(tmp_path: Path, trained: FrozenStage, server: WandbServer):
    """What was torn off is sent too, from the stage's own record."""
    stage = copied(trained, tmp_path / "outputs")
    (log,) = fragments(stage.work)
    tear(log)
    assert records(log, "exit") == []
    record = read_record(stage.work)
    assert record is not None
    write_record(stage.work, replace(record, open_fragment=log.parent.name))
    _is_long_ago(stage)
    assert sync([stage.work], server.address) == Synced(uploaded=1, left=[], settled=1)
    assert mark_of(log).exists()
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with[-1] == 0
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])
    assert server.only_run.axis("train/loss") == ALL


def test_a_start_that_was_killed_does_not_keep_the_later_ones_from_the_server(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    (log,) = fragments(stage.work)
    tear(log)
    assert records(log, "exit") == []
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    assert run(stage) is Outcome.FINISHED
    assert sync([stage.work], server.address) == Synced(uploaded=2, left=[])
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with[-1] == 0
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


def test_a_torn_log_is_cut_to_its_whole_records_and_kept_as_it_was(tmp_path: Path, trained: FrozenStage):
    stage = copied(trained, tmp_path / "outputs")
    (log,) = fragments(stage.work)
    whole, rows = log.read_bytes(), list(history(log))
    assert not cut_to_whole_records(log)
    assert log.read_bytes() == whole
    for end in (len(whole) - 1, len(whole) // 2, len(whole) // 2 + 1, 40 * 1024):
        if end >= len(whole):
            continue
        log.write_bytes(whole[:end])
        before = list(history(log))
        cut_to_whole_records(log)
        assert whole.startswith(log.read_bytes())
        assert list(history(log)) == before == rows[: len(before)]
        assert not cut_to_whole_records(log)
    assert whole.startswith(log.with_suffix(".wandb.uncut").read_bytes())


def test_a_log_that_w_and_b_does_not_read_is_named_in_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "run.wandb"
    log.write_bytes(b"not a log of W&B's")
    assert list(history(log)) == []
    assert f"warning: W&B: {log} was not read" in capsys.readouterr().out


def test_zeros_that_a_power_cut_left_are_cut_off(tmp_path: Path, trained: FrozenStage):
    stage = copied(trained, tmp_path / "outputs")
    (log,) = fragments(stage.work)
    whole = log.read_bytes()
    log.write_bytes(whole + bytes(4096))
    assert cut_to_whole_records(log)
    assert log.read_bytes() == whole


def test_an_upload_that_failed_in_the_middle_is_gone_on_with_and_no_row_is_there_twice(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, monkeypatch: pytest.MonkeyPatch
):
    stage = copied(trained, tmp_path / "outputs")
    (log,) = fragments(stage.work)
    tear(log)
    with monkeypatch.context() as patch:  # `wandb sync` fails at the end of a torn log, with its rows uploaded
        patch.setattr(sync_module, "cut_to_whole_records", lambda _log: False)
        with pytest.raises(UserError, match="did not upload it"):
            sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == ALL[: len(server.only_run.axis("train/loss"))] != []
    _is_long_ago(stage)
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with[-1] == 0
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


def test_an_upload_of_which_nothing_arrived_is_done_again(tmp_path: Path, trained: FrozenStage, server: WandbServer):
    stage = copied(trained, tmp_path / "outputs")
    refusing = [sys.executable, "-c", "print('no')"]
    with pytest.raises(UserError, match="did not upload it: no; see"):
        sync([stage.work], server.address, refusing)
    assert sync([stage.work], server.address).uploaded == 1
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.ended_with[-1] == 0
    assert sync([stage.work], server.address) == Synced(uploaded=0, left=[])


def test_a_failure_does_not_keep_other_stages_from_the_server(
    tmp_path: Path, trained: FrozenStage, server: WandbServer, capsys: pytest.CaptureFixture[str]
):
    one, other = copied(trained, tmp_path / "one"), copied(trained, tmp_path / "other")
    program, asked = _uploader(tmp_path, failing_below=one.outputs)
    with pytest.raises(UserError, match="did not upload it"):
        sync([one.work, other.work], server.address, program)
    assert len(asked.read_text().splitlines()) == 2
    assert [mark_of(fragments(each.work)[0]).exists() for each in (one, other)] == [False, True]
    assert f"error: wandb sync {one.work}" in capsys.readouterr().out


def test_every_start_is_uploaded_once_and_in_order(tmp_path: Path):
    """A program stands for `wandb sync`, since no server is here: it keeps W&B's own mark."""
    stage = tracked(tmp_path / "outputs")
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    assert run(stage) is Outcome.FINISHED
    first, second = (log.parent for log in fragments(stage.work))
    program, asked = _uploader(tmp_path)
    with _server() as address:
        assert sync([stage.work], address, program) == Synced(uploaded=2, left=[])
        assert asked.read_text().splitlines() == [f"sync {first}", f"sync {second}"]
        assert sync([stage.work], address, program) == Synced(uploaded=0, left=[])
    assert len(asked.read_text().splitlines()) == 2


def test_a_start_that_is_being_written_is_left_for_later(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path / "outputs")
    assert run(stage) is Outcome.FINISHED
    (log,) = fragments(stage.work)
    record = read_record(stage.work)
    assert record is not None
    write_record(stage.work, replace(record, open_fragment=log.parent.name))
    write_frozen(stage)
    program, asked = _uploader(tmp_path)
    assert sync([stage.work], server.address, program) == Synced(uploaded=0, left=[log])
    assert not asked.exists()
    # Killed long ago: it has given no sign of life since.
    _is_long_ago(stage)
    assert sync([stage.work], server.address, program).uploaded == 1


def test_without_a_server_sync_says_so_in_a_line_and_marks_nothing(trained: FrozenStage):
    with pytest.raises(UserError, match=r"^the W&B server http://127.0.0.1:9 is not reached .*; nothing was uploaded"):
        main(["--outputs", str(trained.outputs)])
    assert list(trained.outputs.rglob("*.synced")) == []


def test_an_upload_that_w_and_b_refuses_is_a_line_and_marks_nothing(
    trained: FrozenStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """W&B's own program, without a key."""
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with _server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with pytest.raises(UserError, match=r"did not upload it: .*; see `wandb login`, then run this again"):
            sync([trained.work], address)
    assert list(trained.outputs.rglob("*.synced")) == []


def _is_long_ago(stage: FrozenStage) -> None:
    progress = read_progress(stage.work)
    assert progress is not None
    write_progress(stage.work, replace(progress, updated_at=time.time() - 2 * SECONDS_UNTIL_SILENT))


def _uploader(directory: Path, failing_below: Path = Path("/nowhere")) -> tuple[list[str], Path]:
    asked, program = directory / "asked", directory / "uploader.py"
    program.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(asked)!r}).open('a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "(log,) = pathlib.Path(sys.argv[2]).glob('*.wandb')\n"
        f"if pathlib.Path({str(failing_below)!r}) not in log.parents: log.with_suffix('.wandb.synced').touch()\n"
    )
    return [sys.executable, str(program)], asked


@contextmanager
def _server() -> Iterator[str]:
    """A server that answers, and knows no page."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
