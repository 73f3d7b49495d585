import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import RunSettings
from pipeline.errors import UserError
from pipeline.terminal.tables import stage_state
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.plan import plan_run
from pipeline.workflow.progress import Failure, Phase, Progress, write_failure, write_progress
from pipeline.workflow.runs import config_with, gather_pictures, read_run, record_run, run_artifacts, run_names
from tests.support.fakes import plan, publish, run_config, with_settings


def record(outputs: Path, name: str, **changes: Any) -> Path:
    return record_run(plan_run(run_config(outputs, run=RunSettings(name=name), **changes), ("seed=0",)))


def test_a_recorded_run_says_which_artifact_stands_for_each_stage(tmp_path: Path):
    assert record(tmp_path, "first") == tmp_path / "runs" / "first"
    found = read_run(tmp_path, "first")
    made = plan(tmp_path)
    assert [stage.name for stage in found.stages] == list(made)
    assert {stage.name: stage.fingerprint for stage in found.stages} == {n: s.fingerprint for n, s in made.items()}
    assert found.overrides == ["seed=0"]
    assert found.config["stage"]["decoder"]["loss"] == {"weight": 0.1}
    assert found.fingerprint_of("clip") == made["clip"].fingerprint
    assert found.fingerprint_of("nothing") is None


def test_recording_a_run_again_under_its_name_replaces_it(tmp_path: Path):
    record(tmp_path, "first")
    before = read_run(tmp_path, "first").fingerprint_of("decoder")
    record(tmp_path, "first", stages=with_settings("decoder", note="other"))
    assert read_run(tmp_path, "first").fingerprint_of("decoder") != before
    assert run_names(tmp_path) == ["first"]


def test_the_config_of_a_stage_that_a_run_no_longer_has_is_still_there(tmp_path: Path):
    record(tmp_path, "first")
    before = read_run(tmp_path, "first")
    record(tmp_path, "first", stages=with_settings("decoder", note="other"))
    now = read_run(tmp_path, "first")
    fingerprints = [each.fingerprint_of("decoder") for each in (before, now)]
    assert all(fingerprints)
    assert [config_with(tmp_path, "first", "decoder", each or "") for each in fingerprints] == [
        before.config,
        now.config,
    ]
    assert config_with(tmp_path, "first", "decoder", "0" * 64) is None
    assert config_with(tmp_path, "other", "decoder", "0" * 64) is None


def test_run_names_begin_with_the_latest(tmp_path: Path):
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        directory = record(tmp_path, name)
        when = (directory / "run.json").stat().st_mtime - age
        os.utime(directory / "run.json", (when, when))
    assert run_names(tmp_path) == ["new", "middle", "old"]


def test_an_unknown_run_lists_those_there_are(tmp_path: Path):
    with pytest.raises(UserError, match=r"no run 'x' .*; there is no run yet: start one with `unclip run`"):
        read_run(tmp_path, "x")
    record(tmp_path, "first")
    with pytest.raises(UserError, match=r"no run 'x' .*; runs there: first"):
        read_run(tmp_path, "x")


def test_only_finished_stages_have_artifacts(tmp_path: Path):
    record(tmp_path, "first")
    made = plan(tmp_path)
    publish(made["clip"])
    publish(made["prepare"])
    assert list(run_artifacts(tmp_path, read_run(tmp_path, "first"))) == ["prepare", "clip"]


def test_pictures_are_gathered_by_stage(tmp_path: Path):
    record(tmp_path, "first")
    publish(plan(tmp_path)["decoder"], b"picture", file="samples.png")
    copies = gather_pictures(tmp_path, read_run(tmp_path, "first"))
    assert copies == [tmp_path / "runs" / "first" / "pictures" / "decoder-samples.png"]
    assert copies[0].read_bytes() == b"picture"


def state(outputs: Path, name: str) -> tuple[str, str]:
    run = read_run(outputs, "first")
    return stage_state(ArtifactStore(outputs), next(stage for stage in run.stages if stage.name == name))


def test_a_gathered_picture_that_became_a_link_is_written_anew(tmp_path: Path):
    record(tmp_path, "first")
    publish(plan(tmp_path)["decoder"], b"picture", file="samples.png")
    run = read_run(tmp_path, "first")
    copies = gather_pictures(tmp_path, run)
    copies[0].unlink()
    copies[0].symlink_to(tmp_path / "not there" / "at all.png")
    assert gather_pictures(tmp_path, run) == copies
    assert copies[0].is_file()
    assert not copies[0].is_symlink()


def test_a_stage_s_state_is_read_from_its_files(tmp_path: Path):
    record(tmp_path, "first")
    clip = plan(tmp_path)["clip"]
    assert clip.frozen is not None
    work = clip.frozen.work
    assert state(tmp_path, "clip") == ("waiting", "")
    work.mkdir(parents=True)
    write_progress(work, Progress(Phase.WORKING, samples_seen=10, max_samples=100, updated_at=2e10))
    assert state(tmp_path, "clip") == ("running", "10 / 100 samples")
    write_progress(work, Progress(Phase.INTERRUPTED, samples_seen=10, max_samples=100, updated_at=2e10))
    assert state(tmp_path, "clip") == ("interrupted", "10 / 100 samples")
    write_failure(work, Failure("no memory", is_user_error=False))
    assert state(tmp_path, "clip") == ("failed", "no memory")
    publish(clip)
    assert state(tmp_path, "clip") == ("finished", "1 s · loss 0.5")


def test_a_stage_that_was_killed_is_shown_as_stopped_with_its_checkpoint(tmp_path: Path):
    record(tmp_path, "first")
    clip = plan(tmp_path)["clip"]
    assert clip.frozen is not None
    (clip.frozen.work / "checkpoints").mkdir(parents=True)
    write_progress(clip.frozen.work, Progress(Phase.WORKING, samples_seen=10, max_samples=100, updated_at=1.0))
    assert state(tmp_path, "clip")[0] == "stopped"
    assert "no checkpoint yet" in state(tmp_path, "clip")[1]
    (clip.frozen.work / "checkpoints" / "samples-000000000008.json").write_text("{}")
    assert "checkpoint at 8 samples" in state(tmp_path, "clip")[1]


def test_a_command_that_is_killed_before_its_record_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(_from: Path, _to: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            record(tmp_path, "first")
    assert run_names(tmp_path) == []
    record(tmp_path, "first")
    assert run_names(tmp_path) == ["first"]


def test_a_record_that_cannot_be_read_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (record(tmp_path, "first") / "run.json").unlink()
    assert main(["status", "--outputs", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (said.out + said.err).count("run.json is gone") == 1
