"""What every command says of damaged, lost and foreign artifacts, and that what it says mends them."""

import shlex
import shutil
import time
from pathlib import Path
from threading import Event

import pytest

from pipeline.config import OnDamage
from pipeline.terminal.tables import stage_state
from pipeline.workflow.artifacts import MANIFEST, SET_ASIDE, Artifact, ArtifactStore
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.ownership import acquire
from pipeline.workflow.plan import Action, Plan
from pipeline.workflow.progress import Phase, Progress, write_progress
from pipeline.workflow.runs import finished_artifacts, read_run, run_artifacts, run_directory
from tests.support.command import said, shown
from tests.support.stores import flip, planned_where


def action_of_clip(plan: Plan) -> tuple[Action, str]:
    return next((stage.action, stage.reason) for stage in plan.stages if stage.name == "clip")


def test_a_stage_that_lost_its_manifest_is_no_new_one(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    held = (clip.path / MANIFEST).rename(outputs / "held")
    line = f"{clip.path / MANIFEST} is gone"
    assert action_of_clip(planned_where(outputs, OnDamage.STOP)) == (
        Action.BLOCKED,
        f"{line}; run it again with store.on_damage=rebuild to make it anew, or put an intact copy of the file there, "
        f"and this takes it back: unclip verify --all --outputs {outputs}",
    )
    action, reason = action_of_clip(planned_where(outputs, OnDamage.REBUILD))
    assert action is not Action.REUSE
    assert line in reason
    assert shown(capsys, "verify", "first", "--outputs", str(outputs))[0] == 2
    assert "damaged" in said("status", "first", "--outputs", str(outputs))
    held.rename(clip.path / MANIFEST)
    assert action_of_clip(planned_where(outputs, OnDamage.STOP))[0] is Action.REUSE


def test_of_a_stage_that_is_set_aside_every_command_names_the_file(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    file = clip.path / "weights.bin"
    flip(file)
    for _ in range(2):
        status, text = shown(capsys, "verify", "first", "--outputs", str(outputs))
        assert (status, text.count(f"{file} does not have the digest")) == (2, 1)
    stage = next(each for each in read_run(outputs, "first").stages if each.name == "clip")
    state, detail = stage_state(ArtifactStore(outputs), stage)
    assert (state, str(file) in detail) == ("damaged", True)
    assert str(file) in action_of_clip(planned_where(outputs, OnDamage.STOP))[1]
    with pytest.raises(DamagedArtifactError, match=rf"{file} .*: stage clip is set aside; .*on_damage=rebuild"):
        finished_artifacts(outputs, read_run(outputs, "first"), [clip.manifest.kind], "sample")
    for kinds in ((), ["another"]):
        with pytest.raises(DamagedArtifactError):
            finished_artifacts(outputs, read_run(outputs, "first"), kinds, "evaluate", also=[clip.manifest.kind])
    flip(file)
    with pytest.raises(DamagedArtifactError) as refusal:
        finished_artifacts(outputs, read_run(outputs, "first"), [clip.manifest.kind], "sample")
    typed = shlex.split(str(refusal.value).partition("this takes it back: unclip ")[2])
    assert "taken back" in said(*typed)


def test_a_manifest_that_was_put_back_leaves_no_other_beside_it(outputs: Path, clip: Artifact):
    content = (clip.path / MANIFEST).read_bytes()
    (clip.path / MANIFEST).rename(clip.path / SET_ASIDE)
    (clip.path / MANIFEST).write_bytes(content)
    said("verify", "first", "--outputs", str(outputs))
    assert not (clip.path / SET_ASIDE).exists()


@pytest.mark.parametrize("content", [b"\xff", b'{"a": NaN}', b'{"schema_version": 1, "stage": 2}', None])
def test_a_manifest_that_is_damaged_stops_no_command_that_looks(
    outputs: Path, clip: Artifact, content: bytes | None, capsys: pytest.CaptureFixture[str]
):
    (clip.path / MANIFEST).unlink()
    if content is None:
        (clip.path / MANIFEST).mkdir()
    else:
        (clip.path / MANIFEST).write_bytes(content)
    for arguments in (["status", "first"], ["compare", "first", "second"], ["card", "first"], ["du"]):
        status, text = shown(capsys, *arguments, "--outputs", str(outputs))
        assert status == 0
        assert "damaged" in text or arguments == ["du"]
    assert shown(capsys, "verify", "--all", "--outputs", str(outputs))[0] == 2
    assert action_of_clip(planned_where(outputs, OnDamage.REBUILD))[0] is Action.RUN


def test_a_card_of_a_run_that_is_damaged_says_so_first(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    (clip.path / "weights.bin").write_bytes(b"")
    _, text = shown(capsys, "card", "first", "--outputs", str(outputs))
    assert f"stage clip is damaged: {clip.path / 'weights.bin'} has 0 bytes" in text
    assert ": damaged, 5 of 6 stages done" in (run_directory(outputs, "first") / "README.md").read_text()


def test_a_manifest_that_is_a_link_to_itself_is_damage(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    manifest, at = clip.path / MANIFEST, ["--outputs", str(outputs)]
    manifest.unlink()
    manifest.symlink_to(MANIFEST)
    for _ in range(2):
        status, text = shown(capsys, "verify", "--all", *at)
        assert (status, f"{manifest} cannot be read (it is a link to itself)" in text) == (2, True)
    assert action_of_clip(planned_where(outputs, OnDamage.STOP))[0] is Action.BLOCKED
    assert action_of_clip(planned_where(outputs, OnDamage.REBUILD))[0] is Action.RUN


def test_the_manifest_of_another_artifact_of_the_stage_is_damage(outputs: Path, capsys: pytest.CaptureFixture[str]):
    """As when the copy of a wrong one is put back."""
    first, second = (run_artifacts(outputs, read_run(outputs, name))["decoder"] for name in ("first", "second"))
    for each in second.path.iterdir():
        shutil.copy(each, first.path / each.name)
    at = ("--outputs", str(outputs))
    line = f"{first.path / MANIFEST} is the one of {second.name}"
    assert "damaged" in said("status", "first", *at)
    status, text = shown(capsys, "verify", "first", *at)
    assert status == 2
    assert line in text
    store = ArtifactStore(outputs)
    assert store.readable("decoder", first.manifest.fingerprint) is None
    assert store.own("decoder", second.manifest.fingerprint) is not None


def test_an_artifact_of_which_no_work_folder_tells_is_missed_as_others_were_made_from_it(
    outputs: Path, clip: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As in a store that an earlier version pulled."""
    pulled = pulled_from(outputs, tmp_path)
    shutil.rmtree(pulled / "work")
    at = ("--outputs", str(pulled))
    assert shown(capsys, "verify", "first", *at)[0] == 0
    place = ArtifactStore(pulled).path("clip", clip.manifest.fingerprint)
    place.rename(tmp_path / "held")
    for arguments in (("verify", "first", *at), ("verify", "--all", *at)):
        status, text = shown(capsys, *arguments)
        assert status == 2
        assert f"{place} is gone; put it back, or run again to make it anew" in text
    (tmp_path / "held").rename(place)
    assert shown(capsys, "verify", "--all", *at)[0] == 0


@pytest.mark.parametrize("stage", ["clip", "decoder"])
def test_an_artifact_that_was_pulled_and_taken_away_is_missed_by_every_command(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
):
    pulled = pulled_from(outputs, tmp_path)
    (place,) = (pulled / "artifacts" / stage).iterdir()
    place.rename(tmp_path / "held")
    at = ("--outputs", str(pulled))
    status, text = shown(capsys, "verify", "first", *at)
    assert (status, f"{place} is gone; put it back, or run again to make it anew" in text) == (2, True)
    assert f"{stage} " in next(line for line in said("status", "first", *at).splitlines() if "damaged" in line)
    plan = {each.name: each for each in planned_where(pulled, OnDamage.STOP).stages}
    assert (plan[stage].action, plan[stage].reason) == (Action.RUN, f"anew, as {place} is gone")
    assert "pulled" in said("pull", "first", str(tmp_path / "remote"), *at)
    assert shown(capsys, "verify", "first", *at)[0] == 0


def test_push_does_not_call_an_artifact_that_was_taken_away_unfinished(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pulled = pulled_from(outputs, tmp_path)
    (place,) = (pulled / "artifacts" / "decoder").iterdir()
    shutil.rmtree(place)
    status, text = shown(capsys, "push", "first", str(tmp_path / "another"), "--outputs", str(pulled))
    assert (status, f"without decoder: {place} is gone; put it back, or run again" in text) == (2, True)


def pulled_from(outputs: Path, beside: Path) -> Path:
    """Another store, to which the run was pulled."""
    said("push", "first", str(beside / "remote"), "--outputs", str(outputs))
    said("pull", "first", str(beside / "remote"), "--outputs", str(beside / "pulled"))
    return beside / "pulled"


def test_an_artifact_that_was_taken_away_is_missed_by_every_command(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    work = ArtifactStore(outputs).work("clip", clip.manifest.fingerprint)
    owner = acquire(work, 60.0, Event())
    write_progress(work, Progress(Phase.PUBLISHING, updated_at=time.time()))
    owner.release()
    shutil.rmtree(clip.path)
    at = ("--outputs", str(outputs))
    for arguments in (("verify", "first", *at), ("verify", "--all", *at)):
        status, text = shown(capsys, *arguments)
        assert status == 2
        assert f"{clip.path} is gone; put it back, or run again to make it anew" in text
    assert "damaged" in said("status", "first", *at)
    assert action_of_clip(planned_where(outputs, OnDamage.STOP)) == (Action.RUN, f"anew, as {clip.path} is gone")
