"""What W&B has of stages that were tracked offline, once `unclip sync` has sent their records; and TensorBoard."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import TrackedArtifacts, TrackingMode
from pipeline.tracking.sync import sync
from pipeline.tracking.wandb_record import read_record
from pipeline.training.context import StageContext
from pipeline.training.stage import run_stage
from pipeline.workflow.artifacts import MANIFEST
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure
from tests.support import tiny
from tests.support.tiny import SCRIPT, finished, rows, run
from tests.support.tracked import (
    ALL,
    KEY,
    UNREACHABLE,
    again,
    at_40,
    crash,
    no_secret_below,
    start,
    stop,
    tracked,
    wait_until,
)
from tests.support.wandb_server import ServerRun, WandbServer, serving


@dataclass(frozen=True)
class Sent:
    """A stage that nothing disturbed, and the server that its record and its data's were sent to."""

    stage: FrozenStage
    server: WandbServer
    files_before_sync: frozenset[str]

    @property
    def run(self) -> ServerRun:
        record = read_record(self.stage.work)
        assert record is not None
        return self.server.runs[record.id]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    stage = tracked(tmp_path_factory.mktemp("sent"), sample_every_samples=40)
    data = tiny.data_of(stage).model_copy(update={"tracking": stage.tracking, "run": "sweep.0", "group": "sweep"})
    write_frozen(data)
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {**UNREACHABLE, "WANDB_BASE_URL": server.address}.items():
            patch.setenv(name, value)
        assert run_stage(data, Event()) is Outcome.FINISHED
        assert run_stage(stage, Event()) is Outcome.FINISHED, read_failure(stage.work)
        before = frozenset(path.name for path in stage.work.iterdir())
        assert server.runs == {}
        assert sync([stage.work, data.work], server.address).sent == [data.work, stage.work]
        yield Sent(stage, server, before)


def test_offline_means_recorded_here_and_nothing_else(sent: Sent):
    assert {name for name in sent.files_before_sync if "wandb" in name} == {"wandb.json"}
    assert "metrics.jsonl" in sent.files_before_sync
    assert not any("scratch" in path.name for path in sent.stage.work.iterdir())


def test_a_stage_s_run_has_its_group_job_type_tags_and_id(sent: Sent):
    begun = sent.run.begun
    assert begun["name"] == finished(sent.stage).manifest.tracking["wandb_id"]
    assert (begun["project"], begun["groupName"], begun["jobType"]) == ("trial", "sweep", "learner")
    assert begun["displayName"] == "sweep.1/learner"
    assert set(begun["tags"]) == {"sweep.1", "sweep", "learner"}


def test_the_rows_are_those_of_the_record_at_the_numbers_of_their_lines(sent: Sent):
    lines = [json.loads(line) for line in (sent.stage.work / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(sent.run.rows) == 13  # ten steps, the validation, two pictures
    assert [row["_step"] for row in sent.run.rows] == list(range(len(lines)))
    assert [row["samples_seen"] for row in sent.run.rows] == [line["samples_seen"] for line in lines]
    scalars = [row for row in sent.run.rows if "samples" not in row]
    assert [{name: value for name, value in row.items() if name[0] != "_"} for row in scalars] == rows(sent.stage)
    seen = [row["samples_seen"] for row in sent.run.rows]
    assert seen == sorted(seen)
    assert sent.run.summary["loss"] == finished(sent.stage).manifest.metrics["loss"]


def test_curves_are_drawn_over_the_samples(sent: Sent):
    """As the client writes it into the config: 1 is a metric's name, 2 the pattern of names, 5 the axis's number."""
    axis, others = sent.run.config["_wandb"]["value"]["m"]
    assert (axis["1"], others["2"], others["5"]) == ("samples_seen", "*", 1)


def test_the_config_has_the_settings_the_overrides_and_the_origin_of_the_inputs(sent: Sent):
    values = {name: entry["value"] for name, entry in sent.run.config.items()}
    assert values["settings"] == sent.stage.settings
    assert values["overrides"] == ["stage.learner.dropout=0.0"]
    data = sent.stage.find_inputs()["data"][0]
    assert values["lineage"]["data"] == [
        {
            "stage": "data",
            "fingerprint": tiny.DATA,
            "manifest_sha256": file_sha256(data.path / MANIFEST),
            "made_by_run": "sweep.0",
            "wandb_id": data.manifest.tracking["wandb_id"],
        }
    ]
    assert data.manifest.tracking["wandb_id"] in sent.server.runs


def test_sample_grids_are_images_with_captions(sent: Sent):
    grids = [row for row in sent.run.rows if "samples" in row]
    assert [row["samples_seen"] for row in grids] == [40, 80]
    assert all(row["samples"]["caption"] == "a caption" for row in grids)
    with Image.open(io.BytesIO(sent.server.files[grids[0]["samples"]["path"]])) as image:
        assert image.size == (4, 4)


def test_a_picture_that_is_part_of_the_artifact_is_sent_long_after_it_was_published(
    tmp_path: Path, server: WandbServer
):
    def draw(context: StageContext) -> None:
        Image.new("RGB", (6, 5)).save(context.output / "grid.png")
        context.tracker.log_picture(40, "evaluate/grid", context.output / "grid.png", ["red"])

    stage = tracked(tmp_path)
    at_40(draw)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    sync([stage.work], server.address)
    (grid,) = [row["evaluate/grid"] for row in server.only_run.rows if "evaluate/grid" in row]
    with Image.open(io.BytesIO(server.files[grid["path"]])) as image:
        assert image.size == (6, 5)


def test_the_artifact_is_a_reference_and_nothing_is_copied(sent: Sent):
    place = finished(sent.stage).path
    artifact = sent.server.artifacts[-1]
    assert (artifact["artifactCollectionName"], artifact["artifactTypeName"]) == (
        f"learner-{tiny.LEARNER[:12]}",
        "learner",
    )
    contents = json.loads(sent.server.files[f"manifest-{len(sent.server.artifacts)}"])["contents"]
    assert {entry["ref"] for entry in contents.values()} == {file.as_uri() for file in place.iterdir()}
    assert json.loads(artifact["metadata"])["manifest_sha256"] == file_sha256(place / MANIFEST)
    assert not any(name.endswith(".safetensors") for name in sent.server.files)


def test_the_inputs_are_linked(sent: Sent):
    assert f"data-{tiny.DATA[:12]}:latest" in sent.server.used


def test_a_finished_run_ends_with_status_0(sent: Sent):
    assert (sent.run.ended_with, sent.run.preempted) == ([0], 0)


def test_no_secret_is_written(sent: Sent):
    assert KEY not in write_frozen(sent.stage).path.read_text()
    no_secret_below(sent.stage.outputs)


def test_a_stopped_run_is_preempted_and_goes_on_under_its_id(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path)
    at_40(stop)
    assert run(stage) is Outcome.INTERRUPTED
    sync([stage.work], server.address)
    assert (server.only_run.ended_with, server.only_run.preempted) == ([75], 1)
    # Another member of another sweep goes on with it.
    other = stage.model_copy(update={"run": "other.0", "group": "other"})
    write_frozen(other)
    assert again(other) is Outcome.FINISHED
    sync([stage.work], server.address)
    assert server.only_run.ended_with == [75, 0]
    assert server.only_run.begun["groupName"] == "sweep"
    assert server.only_run.axis("train/loss") == ALL


def test_a_failed_run_is_failed_and_its_rows_are_not_sent_twice(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, checkpoint_every_samples=32, sample_every_samples=16)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    assert run(stage) is Outcome.FAILED
    sync([stage.work], server.address)
    assert server.only_run.ended_with == [1]
    assert again(stage) is Outcome.FINISHED
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == ALL
    assert server.only_run.axis("samples") == list(range(16, 81, 16))
    assert server.only_run.axis("validation/loss") == [80]
    assert [row["_step"] for row in server.only_run.rows] == list(range(16))


def test_rows_from_before_tracking_was_on_are_sent_as_well(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, TrackingMode.NONE)
    at_40(stop)
    run(stage)
    assert read_record(stage.work) is None
    assert again(tracked(tmp_path)) is Outcome.FINISHED
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == ALL


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id_with_every_row_once(tmp_path: Path, server: WandbServer):
    stage = tracked(tmp_path, step_s=0.04, max_samples=960, checkpoint_every_samples=240, sample_every_samples=160)
    run_stage(tiny.data_of(stage), Event())
    process = start(stage)
    wait_until(lambda: (latest_checkpoint_samples(stage.work) or 0) >= 480 and len(rows(stage)) >= 75)
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = read_record(stage.work)
    assert start(stage).wait(timeout=180) == 0, (stage.work / "log.txt").read_text()
    assert read_record(stage.work) == record
    sync([stage.work], server.address)
    assert server.only_run.axis("train/loss") == [row["samples_seen"] for row in rows(stage) if "train/loss" in row]
    assert server.only_run.axis("train/loss") == list(range(8, 961, 8))
    assert server.only_run.axis("samples") == list(range(160, 961, 160))
    seen = [row["samples_seen"] for row in server.only_run.rows]
    assert seen == sorted(seen)


def test_a_server_that_is_not_reached_does_not_stop_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    stage = tracked(tmp_path, TrackingMode.ONLINE)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    said = capfd.readouterr().out
    assert "warning: W&B: not reached" in said
    assert f"it is kept in {stage.work}, and `unclip sync` sends what is missing" in said
    assert [row["samples_seen"] for row in rows(stage) if "train/loss" in row] == ALL
    no_secret_below(tmp_path)


def test_an_artifact_is_copied_where_the_config_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    stage = tracked(tmp_path / "outputs", artifacts=TrackedArtifacts.COPY)
    assert run(stage) is Outcome.FINISHED
    sync([stage.work], server.address)
    contents = json.loads(server.files["manifest-1"])["contents"]
    assert set(contents) == {file.name for file in finished(stage).path.iterdir()}
    assert all("ref" not in entry for entry in contents.values())
    weights = finished(stage).path / "weights.safetensors"
    assert server.files[weights.name] == weights.read_bytes()


def test_tensorboard_has_the_same_rows_and_pictures_with_no_step_twice(tmp_path: Path):
    stage = tracked(tmp_path, TrackingMode.NONE, tensorboard=True, checkpoint_every_samples=32, sample_every_samples=16)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    assert run(stage) is Outcome.FAILED
    assert again(stage) is Outcome.FINISHED
    require_all_in_tensorboard(stage)


def test_tensorboard_that_is_switched_on_later_has_the_rows_from_before(tmp_path: Path):
    options: dict[str, Any] = {"checkpoint_every_samples": 32, "sample_every_samples": 16}
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    assert run(tracked(tmp_path, TrackingMode.NONE, **options)) is Outcome.FAILED
    stage = tracked(tmp_path, TrackingMode.NONE, tensorboard=True, **options)
    assert again(stage) is Outcome.FINISHED
    require_all_in_tensorboard(stage)


def require_all_in_tensorboard(stage: FrozenStage) -> None:
    events = EventAccumulator(str(stage.work / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [event.step for event in events.Scalars("train/loss")] == ALL
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
