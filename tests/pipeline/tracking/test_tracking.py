import json
import signal
import sys
import time
from pathlib import Path
from threading import Event

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import TrackedArtifacts, TrackingMode
from pipeline.tracking.wandb_record import fragments, read_record
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import MANIFEST, file_sha256
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import (
    Outcome,
    latest_checkpoint_samples,
    read_failure,
)
from tests.support import tiny
from tests.support.tiny import SCRIPT, finished, rows, run
from tests.support.tracked import (
    KEY,
    UNREACHABLE,
    axis,
    config,
    crash,
    history,
    no_secret_below,
    records,
    start,
    tracked,
    wait_until,
)


@pytest.fixture(autouse=True)
def _a_key_and_no_network(monkeypatch: pytest.MonkeyPatch):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)


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
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
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
    process = start(stage)
    wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 480 and len(rows(stage)) >= 75)
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = read_record(stage.work)
    assert record is not None
    assert record.open_fragment is not None
    assert start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
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
    no_secret_below(tmp_path)


def test_no_secret_is_written(trained: FrozenStage):
    frozen_file = write_frozen(trained).path
    assert KEY not in frozen_file.read_text()
    no_secret_below(trained.outputs)


def test_an_artifact_is_copied_where_the_config_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: FrozenStage
):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    stage = tracked(tmp_path / "outputs", artifacts=TrackedArtifacts.COPY)
    assert run(stage) is Outcome.FINISHED
    (artifact,) = records(fragments(stage.work)[0], "artifact")
    assert all("ref" not in entry for entry in artifact["manifest"]["contents"])


def test_tensorboard_has_the_same_rows_and_pictures_with_no_step_twice(tmp_path: Path):
    stage = tracked(tmp_path, TrackingMode.NONE, tensorboard=True, checkpoint_every_samples=32, sample_every_samples=16)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
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
