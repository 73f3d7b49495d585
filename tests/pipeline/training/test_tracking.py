import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import SCRIPT, finished, frozen, rows, run

from pipeline.config import TrackedArtifacts, TrackingMode, TrackingSettings
from pipeline.errors import UserError
from pipeline.training.stage import run_stage
from pipeline.training.tracking.sync import Synced, main, sync
from pipeline.training.tracking.wandb_record import fragments, read_record, write_record
from pipeline.workflow.artifacts import MANIFEST, file_sha256
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import (
    SECONDS_UNTIL_SILENT,
    Outcome,
    latest_checkpoint_samples,
    read_failure,
    read_progress,
    write_progress,
)

KEY = "0123456789abcdef" * 2 + "01234567"
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}


@pytest.fixture(autouse=True)
def _a_key_and_no_network(monkeypatch: pytest.MonkeyPatch):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)


def tracked(
    outputs: Path,
    mode: TrackingMode = TrackingMode.OFFLINE,
    *,
    artifacts: TrackedArtifacts = TrackedArtifacts.REFERENCE,
    tensorboard: bool = False,
    **settings: Any,
) -> FrozenStage:
    tracking = TrackingSettings(mode=mode, project="trial", entity=None, artifacts=artifacts, tensorboard=tensorboard)
    names = {"tracking": tracking, "run": "sweep.1", "group": "sweep", "overrides": ["stage.learner.dropout=0.0"]}
    return frozen(outputs, **settings).model_copy(update=names)


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    """What W&B's own reader finds in a log."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def history(stage: FrozenStage) -> list[dict[str, Any]]:
    return [record["item"] for log in fragments(stage.work) for record in records(log, "history")]


def config(log: Path) -> dict[str, Any]:
    return records(log, "run")[0]["config"]["update"]


def axis(stage: FrozenStage, name: str) -> list[int]:
    return [row["samples_seen"] for row in history(stage) if name in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> FrozenStage:
    """A stage that nothing disturbed, and the stage that made its data, both tracked."""
    stage = tracked(tmp_path_factory.mktemp("trained"), sample_every_samples=40)
    data = tiny.data_of(stage).model_copy(update={"tracking": stage.tracking, "run": "sweep.0", "group": "sweep"})
    assert run_stage(data, Event()) is Outcome.FINISHED
    assert run_stage(stage, Event()) is Outcome.FINISHED, read_failure(stage.work)
    return stage


def test_a_stage_s_run_has_its_group_job_type_tags_and_id(trained: FrozenStage):
    (log,) = fragments(trained.work)
    (begun,) = records(log, "run")
    record = read_record(trained.work)
    assert record is not None
    assert begun["run_id"] == record.id == finished(trained).manifest.tracking["wandb_id"]
    assert (begun["project"], begun["run_group"], begun["job_type"]) == ("trial", "sweep", "learner")
    assert set(begun["tags"]) == {"sweep.1", "sweep", "learner"}
    assert begun["resume"]


def test_the_rows_are_those_of_the_own_record_on_the_axis_of_samples(trained: FrozenStage):
    (log,) = fragments(trained.work)
    assert {"name": "samples_seen", "options": {"defined": True}} in records(log, "metric")
    assert any(metric.get("step_metric") == "samples_seen" for metric in records(log, "metric"))
    sent = [row for row in history(trained) if "samples._type" not in row]
    assert [{name: value for name, value in row.items() if name[0] != "_"} for row in sent] == rows(trained)
    seen = [row["samples_seen"] for row in history(trained)]
    assert seen == sorted(seen)
    summary = {name: value for each in records(log, "summary") for name, value in each["update"].items()}
    assert summary["loss"] == finished(trained).manifest.metrics["loss"]


def test_the_config_has_the_settings_the_overrides_and_the_origin_of_the_inputs(trained: FrozenStage):
    (log,) = fragments(trained.work)
    values = config(log)
    assert values["settings"] == trained.settings
    assert values["overrides"] == ["stage.learner.dropout=0.0"]
    data = trained.find_inputs()["data"][0]
    assert values["lineage"]["data"] == [
        {
            "stage": "data",
            "fingerprint": tiny.DATA,
            "manifest_sha256": file_sha256(data.path / MANIFEST),
            "made_by_run": "sweep.0",
            "wandb_id": data.manifest.tracking["wandb_id"],
        }
    ]
    record = read_record(tiny.data_of(trained).work)
    assert record is not None
    assert record.id == data.manifest.tracking["wandb_id"]


def test_sample_grids_are_images_with_captions(trained: FrozenStage):
    grids = [row for row in history(trained) if "samples._type" in row]
    assert [row["samples_seen"] for row in grids] == [40, 80]
    assert all(row["samples.caption"] == "a caption" for row in grids)
    (log,) = fragments(trained.work)
    with Image.open(log.parent / "files" / grids[0]["samples.path"]) as image:
        assert image.size == (4, 4)


def test_the_artifact_is_a_reference_and_nothing_is_copied(trained: FrozenStage):
    (log,) = fragments(trained.work)
    (artifact,) = records(log, "artifact")
    place = finished(trained).path
    assert (artifact["name"], artifact["type"]) == (f"learner-{tiny.LEARNER[:12]}", "learner")
    files = {file.as_uri() for file in place.iterdir()}
    assert {entry["ref"] for entry in artifact["manifest"]["contents"]} == files
    assert json.loads(artifact["metadata"])["manifest_sha256"] == file_sha256(place / MANIFEST)
    assert list((trained.work / "wandb").rglob("*.safetensors")) == []


def test_a_finished_run_ends_with_status_0(trained: FrozenStage):
    (log,) = fragments(trained.work)
    assert [each.get("exit_code", 0) for each in records(log, "exit")] == [0]
    assert records(log, "preempting") == []


def test_a_stopped_run_is_preempted_and_goes_on_under_its_id(tmp_path: Path):
    stage = tracked(tmp_path)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    # Another member of another sweep goes on with it.
    assert run(stage.model_copy(update={"run": "other.0", "group": "other"})) is Outcome.FINISHED
    first, second = fragments(stage.work)
    assert len(records(first, "preempting")) == 1
    assert [each["exit_code"] for each in records(first, "exit")] == [75]
    assert [each.get("exit_code", 0) for each in records(second, "exit")] == [0]
    begun = [records(log, "run")[0] for log in (first, second)]
    assert begun[0]["run_id"] == begun[1]["run_id"]
    assert {each["run_group"] for each in begun} == {"sweep"}
    assert axis(stage, "train/loss") == list(range(8, 81, 8))


def test_a_failed_run_is_failed_and_its_rows_are_not_sent_twice(tmp_path: Path):
    stage = tracked(tmp_path, checkpoint_every_samples=32, sample_every_samples=16)
    SCRIPT.at_samples, SCRIPT.happens = 56, _crash
    assert run(stage) is Outcome.FAILED
    (log,) = fragments(stage.work)
    assert [each["exit_code"] for each in records(log, "exit")] == [1]
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    assert run(stage) is Outcome.FINISHED
    assert axis(stage, "train/loss") == list(range(8, 81, 8))
    assert axis(stage, "samples._type") == list(range(16, 81, 16))
    assert axis(stage, "validation/loss") == [80]


def test_rows_from_before_tracking_was_on_are_sent_as_well(tmp_path: Path):
    stage = tracked(tmp_path, TrackingMode.NONE)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    run(stage)
    assert not (stage.work / "wandb").exists()
    SCRIPT.at_samples = None
    time.sleep(1.0)  # W&B names a start by its second
    assert run(tracked(tmp_path)) is Outcome.FINISHED
    assert axis(stage, "train/loss") == list(range(8, 81, 8))


def test_a_killed_run_goes_on_under_its_id_with_every_row_once(tmp_path: Path):
    stage = tracked(tmp_path, step_s=0.04, max_samples=960, checkpoint_every_samples=240, sample_every_samples=160)
    run_stage(tiny.data_of(stage), Event())
    process = _start(stage)
    _wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 480 and len(rows(stage)) >= 75)
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = read_record(stage.work)
    assert record is not None
    assert record.open_fragment is not None
    assert _start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
    *killed, last = fragments(stage.work)  # how much of the killed one W&B had written is a matter of chance
    assert last.parent.name != record.open_fragment
    assert all(records(log, "exit") == [] for log in killed)
    assert {records(log, "run")[0]["run_id"] for log in (*killed, last)} == {record.id}
    assert axis(stage, "train/loss") == list(range(8, 961, 8))
    assert axis(stage, "samples._type") == list(range(160, 961, 160))
    seen = [row["samples_seen"] for row in history(stage)]
    assert seen == sorted(seen)


def test_a_server_that_is_not_reached_does_not_stop_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    stage = tracked(tmp_path, TrackingMode.ONLINE)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert "warning: W&B is not reached" in capfd.readouterr().out
    (offline,) = [log for log in fragments(stage.work) if log.parent.name.startswith("offline-")]
    assert len(records(offline, "history")) == 12  # ten steps, the validation, the picture
    _no_secret_below(tmp_path)


def test_no_secret_is_written(trained: FrozenStage):
    frozen_file = write_frozen(trained).path
    assert KEY not in frozen_file.read_text()
    _no_secret_below(trained.outputs)


def test_an_artifact_is_copied_where_the_config_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: FrozenStage
):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    stage = tracked(tmp_path / "outputs", artifacts=TrackedArtifacts.COPY)
    assert run(stage) is Outcome.FINISHED
    (artifact,) = records(fragments(stage.work)[0], "artifact")
    assert all("ref" not in entry for entry in artifact["manifest"]["contents"])


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


def test_a_start_that_is_being_written_is_left_for_later(tmp_path: Path):
    stage = tracked(tmp_path / "outputs")
    assert run(stage) is Outcome.FINISHED
    (log,) = fragments(stage.work)
    record = read_record(stage.work)
    assert record is not None
    write_record(stage.work, replace(record, open_fragment=log.parent.name))
    program, asked = _uploader(tmp_path)
    with _server() as address:
        assert sync([stage.work], address, program) == Synced(uploaded=0, left=[log])
        assert not asked.exists()
        # Killed long ago: it has given no sign of life since.
        progress = read_progress(stage.work)
        assert progress is not None
        write_progress(stage.work, replace(progress, updated_at=time.time() - 2 * SECONDS_UNTIL_SILENT))
        assert sync([stage.work], address, program).uploaded == 1


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


def test_tensorboard_has_the_same_rows_and_pictures_with_no_step_twice(tmp_path: Path):
    stage = tracked(tmp_path, TrackingMode.NONE, tensorboard=True, checkpoint_every_samples=32, sample_every_samples=16)
    SCRIPT.at_samples, SCRIPT.happens = 56, _crash
    assert run(stage) is Outcome.FAILED
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    events = EventAccumulator(str(stage.work / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(8, 81, 8))
    assert losses == pytest.approx({row["samples_seen"]: row["train/loss"] for row in rows(stage)[:-1]})
    assert [event.step for event in events.Images("samples")] == list(range(16, 81, 16))


def test_a_missing_tensorboard_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what an import finds of a package not installed
    stage = tracked(tmp_path, TrackingMode.NONE, tensorboard=True)
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "pip install -e '.[tensorboard]'" in failure.message


def _crash(_context: object) -> None:
    raise RuntimeError("the power went")


def _start(stage: FrozenStage) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)],
        env={**os.environ, "PYTHONPATH": f"{Path(tiny.__file__).parent}:{os.environ.get('PYTHONPATH', '')}"},
    )


def _wait_until(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 180
    while not is_so():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.02)


def _no_secret_below(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def _uploader(directory: Path) -> tuple[list[str], Path]:
    asked, program = directory / "asked", directory / "uploader.py"
    program.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(asked)!r}).open('a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "(log,) = pathlib.Path(sys.argv[2]).glob('*.wandb')\n"
        "log.with_suffix('.wandb.synced').touch()\n"
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
