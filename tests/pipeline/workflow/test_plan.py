import shutil
from pathlib import Path

import pytest

from pipeline.config import PathSettings, Precision, TrackedArtifacts, TrackingMode, TrackingSettings
from pipeline.errors import UserError
from pipeline.workflow.inputs_read import begin_with
from pipeline.workflow.plan import PlannedStage, plan_run
from pipeline.workflow.progress import Failure, write_failure
from tests.support import fakes
from tests.support.fakes import TRAINER, actions, plan, publish, publish_all, with_settings

ALL = list(fakes.WORKFLOW)


def fingerprints(stages: dict[str, PlannedStage]) -> dict[str, str | None]:
    return {name: stage.fingerprint for name, stage in stages.items()}


def touch_checkpoint(stage: PlannedStage, samples: int) -> None:
    assert stage.frozen is not None
    directory = stage.frozen.work / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"samples-{samples:012}.json").write_text("{}")


def test_everything_is_new_at_first_and_planning_writes_nothing(tmp_path: Path):
    made = plan(tmp_path / "outputs")
    assert actions(made) == dict.fromkeys(ALL, "run")
    assert {stage.reason for stage in made.values()} == {"new"}
    assert list(tmp_path.iterdir()) == []


def test_finished_stages_are_reused(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path)
    assert actions(made) == dict.fromkeys(ALL, "reuse")
    assert made["clip"].reason == "finished 2026-01-02 03:04 in 1 s"


def test_a_stage_with_a_checkpoint_resumes_from_the_newest(tmp_path: Path):
    first = plan(tmp_path)
    touch_checkpoint(first["clip"], 9_000)
    touch_checkpoint(first["clip"], 12_800)
    clip = plan(tmp_path)["clip"]
    assert (clip.action, clip.reason) == ("resume", "from the checkpoint at 12,800 samples")


@pytest.mark.parametrize("content", [b"weights", b"others"])
def test_a_checkpoint_that_was_fitted_to_other_bytes_of_its_input_than_are_there_now_is_pointed_out(
    tmp_path: Path, content: bytes
):
    first = plan(tmp_path)
    data, frozen = publish(first["prepare"]), first["clip"].frozen
    assert frozen is not None
    touch_checkpoint(first["clip"], 9_000)
    begin_with(frozen.work, [data], goes_on=False)
    shutil.rmtree(data.path)
    begin_with(frozen.work, [publish(first["prepare"], content)], goes_on=True)
    told = "prepare made anew since, with other bytes than this was made from" in plan(tmp_path)["clip"].reason
    assert told is (content == b"others")


def test_changing_one_decoder_setting_reruns_the_decoder_and_its_dependents_alone(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, with_settings("decoder", loss={"weight": 0.2}))
    assert actions(made) == {**dict.fromkeys(ALL, "reuse"), "decoder": "run", "evaluate": "run"}
    assert made["decoder"].reason == "changed stage.decoder.loss.weight: 0.1 -> 0.2"
    assert made["evaluate"].reason == "because decoder will be new"


def test_a_changed_setting_of_the_first_stage_reruns_everything(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, with_settings("prepare", pictures=11))
    assert actions(made) == dict.fromkeys(ALL, "run")
    assert made["prepare"].reason == "changed stage.prepare.pictures: 10 -> 11"
    assert made["decoder"].reason == "because prepare, clip will be new"


def test_a_removed_stage_reruns_what_took_it_and_says_so(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, {name: values for name, values in fakes.WORKFLOW.items() if name != "upsampler_2"})
    assert actions(made)["evaluate"] == "run"
    assert made["evaluate"].reason == "its inputs are others than before"


def test_the_reason_compares_with_the_nearest_artifact(tmp_path: Path):
    publish_all(plan(tmp_path))
    far = plan(tmp_path, with_settings("decoder", channels=[7], note="far", loss={"weight": 9.0}))
    publish(far["decoder"], finished_at="2027-01-01T00:00:00+0000")
    made = plan(tmp_path, with_settings("decoder", channels=[1, 3]))
    assert made["decoder"].reason == "changed stage.decoder.channels: [1, 2] -> [1, 3]"


def test_a_runtime_setting_changes_no_fingerprint(tmp_path: Path):
    before = fingerprints(plan(tmp_path))
    assert fingerprints(plan(tmp_path, with_settings("clip", batch_size=99))) == before
    assert fingerprints(plan(tmp_path, with_settings("prepare", directory="elsewhere"))) == before


def test_devices_workers_paths_logging_and_tracking_change_no_fingerprint(tmp_path: Path):
    before = fingerprints(plan(tmp_path))
    elsewhere = plan(
        tmp_path,
        paths=PathSettings(outputs=tmp_path / "elsewhere"),
        tracking=TrackingSettings(
            mode=TrackingMode.ONLINE,
            project="other",
            entity="me",
            artifacts=TrackedArtifacts.REFERENCE,
            tensorboard=False,
        ),
        trainer=TRAINER.model_copy(
            update={
                "accelerator": "gpu",
                "devices": 4,
                "micro_batch_size": 2,
                "loader_workers": 3,
                "cpu_threads": None,
                "cache_mib": 0,
                "log_every_steps": 7,
                "validate_every_samples": 5,
                "sample_every_samples": 5,
                "checkpoint_every_samples": 5,
                "checkpoint_every_min": 1.0,
                "keep_checkpoints": 9,
            }
        ),
    )
    assert fingerprints(elsewhere) == before


def test_precision_counts_in_every_stage_that_computes(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, trainer=TRAINER.model_copy(update={"precision": Precision.BFLOAT16_MIXED}))
    assert actions(made) == {**dict.fromkeys(ALL, "run"), "prepare": "reuse"}
    assert made["clip"].reason == "changed trainer.precision: bf16-products -> bf16-mixed"


def test_a_stage_s_own_precision_reruns_that_stage(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, with_settings("decoder", trainer={"precision": "bf16-mixed"}))
    assert actions(made) == {**dict.fromkeys(ALL, "reuse"), "decoder": "run", "evaluate": "run"}


def test_the_seed_counts_in_every_stage_that_computes(tmp_path: Path):
    publish_all(plan(tmp_path))
    made = plan(tmp_path, seed=1)
    assert actions(made) == {**dict.fromkeys(ALL, "run"), "prepare": "reuse"}
    assert made["clip"].reason == "changed seed: 0 -> 1"


def test_a_higher_version_of_a_stage_class_reruns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish_all(plan(tmp_path))
    newer = {**fakes.STAGES, "decoder": fakes.replace_version("decoder", 2)}
    monkeypatch.setattr(fakes, "CATALOG", fakes.Catalog(newer))
    made = plan(tmp_path)
    assert actions(made) == {**dict.fromkeys(ALL, "reuse"), "decoder": "run", "evaluate": "run"}
    assert made["decoder"].reason == "changed the version of stage decoder: 1 -> 2"


def test_the_same_class_under_another_name_is_another_artifact(tmp_path: Path):
    twice = {**fakes.WORKFLOW, "upsampler_2": fakes.WORKFLOW["upsampler_1"]}
    made = plan(tmp_path, twice)
    assert made["upsampler_1"].fingerprint != made["upsampler_2"].fingerprint


def test_a_blocked_stage_blocks_what_needs_it_and_says_why(tmp_path: Path):
    made = plan(tmp_path, with_settings("prepare", is_there=False))
    assert actions(made) == dict.fromkeys(ALL, "blocked")
    assert made["prepare"].reason == "the pictures are not there; fetch them"
    assert made["decoder"].reason == "needs prepare, clip"
    assert made["decoder"].fingerprint is None


def test_the_last_failure_is_part_of_the_reason(tmp_path: Path):
    clip = plan(tmp_path)["clip"]
    assert clip.frozen is not None
    clip.frozen.work.mkdir(parents=True)
    write_failure(clip.frozen.work, Failure("out of memory", is_user_error=False))
    assert plan(tmp_path)["clip"].reason == "new; the last attempt failed: out of memory"


def test_many_changes_are_cut_to_three(tmp_path: Path):
    publish_all(plan(tmp_path))
    stages = with_settings("decoder", loss={"weight": 1.0}, note="n", channels=[3], trainer={"precision": "bf16-mixed"})
    reason = plan(tmp_path, stages, seed=5)["decoder"].reason
    assert reason.count("->") == 3
    assert reason.endswith("and 2 more")


def test_a_frozen_stage_carries_the_resolved_config(tmp_path: Path):
    made = plan(tmp_path, with_settings("decoder", trainer={"loader_workers": 2}))
    frozen = made["decoder"].frozen
    assert frozen is not None
    assert frozen.settings == {"channels": [1, 2], "loss": {"weight": 0.1, "shown_as": "curve"}, "note": None}
    assert frozen.trainer.loader_workers == 2
    assert [each.fingerprint for each in frozen.inputs["clip"]] == [made["clip"].fingerprint]
    assert frozen.inputs["prior"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wdth": 3}, "stage.clip.wdth is an unknown key"),
        ({"width": "wide"}, "stage.clip.width='wide'"),
        ({"trainer": {"device": 3}}, "stage.clip.trainer.device is an unknown key"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError) as caught:
        plan(tmp_path, with_settings("clip", **settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_a_stage_that_the_workflow_lacks_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"stage\.prior has no `kind`"):
        plan(tmp_path, {**fakes.WORKFLOW, "prior": {"layers": 3}})


def test_a_catalog_that_does_not_exist_is_refused(tmp_path: Path):
    config = fakes.run_config(tmp_path).model_copy(update={"catalog": "tests.support.fakes:CATALOGUE"})
    with pytest.raises(UserError, match=r"'tests\.support\.fakes:CATALOGUE' names nothing that can be imported"):
        plan_run(config)
