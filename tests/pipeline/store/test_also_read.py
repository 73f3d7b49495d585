"""A store of others, read under one's own."""

import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.config import OnDamage, PathSettings, RunSettings, StoreSettings
from pipeline.errors import UserError
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.artifacts import MANIFEST, ArtifactStore
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.plan import Action, Plan, plan_run
from pipeline.workflow.progress import Outcome
from pipeline.workflow.publish import publish, start_building
from pipeline.workflow.runs import finished_artifacts, read_run, run_artifacts
from tests.support.fakes import manifest_of, run_config
from tests.support.stores import collect, contents, finish, record, settings, there


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A finished run in a store that nobody here may write to."""
    outputs = tmp_path / "theirs"
    finish(record(outputs, "first").values())
    return outputs


def planned(outputs: Path, theirs: Path, weight: float = 0.1, on_damage: OnDamage = OnDamage.STOP) -> Plan:
    paths, store = PathSettings(outputs=outputs, also_read=(theirs,)), StoreSettings(on_damage=on_damage)
    run = RunSettings(name="mine")
    return plan_run(run_config(outputs, settings(weight=weight), run=run, paths=paths, store=store))


def started(plan: Plan) -> set[Outcome]:
    return {each.outcome for each in start([plan], Display(Console(file=io.StringIO())), waits=True)}


def test_what_is_finished_there_is_linked_to_and_theirs_stays_as_it_is(theirs: Path, tmp_path: Path):
    mine, before = tmp_path / "mine", contents(theirs)
    plan = planned(mine, theirs)
    assert not mine.exists()
    assert {stage.action for stage in plan.stages} == {Action.REUSE}
    assert all(stage.reason.endswith(f", in {theirs}") for stage in plan.stages)
    assert started(plan) == {Outcome.REUSED}
    # From then on the store is whole by itself, for whoever asks it.
    found = ArtifactStore(mine).open("clip", plan.stages[1].fingerprint or "")
    assert found is not None
    assert found.path.is_symlink()
    shutil.rmtree(mine / "runs" / "mine")
    collect(mine)
    assert there(mine) == set()
    assert contents(theirs) == before


def test_what_is_not_there_is_to_run_here(theirs: Path, tmp_path: Path):
    plan = planned(tmp_path / "mine", theirs, weight=0.9)
    actions = {stage.name: stage.action for stage in plan.stages}
    assert (actions["clip"], actions["decoder"]) == (Action.REUSE, Action.RUN)


def test_stores_that_are_none_are_said_when_planned(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "file"
    file.touch()
    for place in (file, tmp_path / "none"):
        planned(tmp_path / "mine", place)
        assert f"paths.also_read has {place}, which is no directory: nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"paths\.outputs={file} is a file; give a directory"):
        planned(file, theirs)


def test_damage_there_is_said_and_left_to_its_owner(theirs: Path, tmp_path: Path):
    plan = planned(tmp_path / "mine", theirs)
    artifact = ArtifactStore(theirs).find("clip", plan.stages[1].fingerprint or "")
    assert artifact is not None
    file = artifact.path / artifact.manifest.files[0].path
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    before = contents(theirs)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"does not have the digest .* in another store: run it again with .*rebuild"
        ):
            started(plan)
        plan = planned(tmp_path / "mine", theirs)
        assert next(stage.name for stage in plan.stages if stage.action is Action.BLOCKED) == "clip"
    assert contents(theirs) == before
    mend(file)
    plan = planned(tmp_path / "mine", theirs)
    assert started(plan) == {Outcome.REUSED}


def test_a_manifest_that_was_lost_there_is_damage_before_it_is_linked_to(theirs: Path, tmp_path: Path):
    artifact = run_artifacts(theirs, read_run(theirs, "first"))["clip"]
    held = (artifact.path / MANIFEST).rename(tmp_path / "held")
    stage = next(each for each in planned(tmp_path / "mine", theirs).stages if each.name == "clip")
    assert stage.action is Action.BLOCKED
    assert stage.reason.startswith(f"{artifact.path / MANIFEST} is gone; it is in another store: run it again with")
    held.rename(artifact.path / MANIFEST)
    assert started(planned(tmp_path / "mine", theirs)) == {Outcome.REUSED}


def mend(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def test_damage_that_comes_after_it_was_linked_to_is_said_by_every_command_until_it_is_mended(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "mine"
    assert started(planned(mine, theirs)) == {Outcome.REUSED}
    artifact = run_artifacts(mine, read_run(mine, "mine"))["clip"]
    file = artifact.path.resolve() / "weights.bin"
    mend(file)
    before = contents(theirs)
    with pytest.raises(DamagedArtifactError) as damage:
        ArtifactStore(mine).open("clip", artifact.manifest.fingerprint)
    assert str(damage.value).startswith(f"{file} does not have the digest in its manifest: stage clip is not linked to")
    for command in ("verify", "verify", "status"):
        assert main([command, "mine", "--outputs", str(mine)]) == (2 if command == "verify" else 0)
        shown = capsys.readouterr().out.replace("\n", "")
        assert "another store" in shown
    with pytest.raises(DamagedArtifactError, match=r"in another store: run it again with store\.on_damage=rebuild"):
        finished_artifacts(mine, read_run(mine, "mine"), [artifact.manifest.kind], "sample")
    assert contents(theirs) == before
    mend(file)
    assert started(planned(mine, theirs)) == {Outcome.REUSED}
    assert main(["verify", "mine", "--outputs", str(mine)]) == 0


def test_a_link_to_what_has_gone_is_damage_until_it_is_back_or_made_here(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "mine"
    assert started(planned(mine, theirs)) == {Outcome.REUSED}
    moved = theirs.rename(tmp_path / "moved")
    for command, status in (("verify", 2), ("status", 0)):
        assert main([command, "mine", "--outputs", str(mine)]) == status
        assert "another store" in capsys.readouterr().out
    plan = planned(mine, theirs)
    assert plan.stages[0].reason.startswith(f"{theirs}/artifacts/")
    assert " is gone; it is in another store: run it again with" in plan.stages[0].reason
    assert {stage.action for stage in plan.stages} == {Action.BLOCKED}
    assert {stage.action for stage in planned(mine, moved).stages} == {Action.REUSE}
    plan = planned(mine, theirs, on_damage=OnDamage.REBUILD)
    assert {stage.action for stage in plan.stages} == {Action.RUN}
    assert plan.stages[0].reason.startswith(f"anew, as {theirs}/artifacts/")
    finish(plan.stages)
    assert {stage.action for stage in planned(mine, theirs).stages} == {Action.REUSE}


def test_a_group_can_read_what_is_published(tmp_path: Path):
    store, key = ArtifactStore(tmp_path), ("clip", 64 * "0")
    before = os.umask(0o002)
    try:
        building = start_building(store, *key, 1)
        save_file({"weight": torch.zeros(2)}, building / "weights.safetensors")
        assert (building / "weights.safetensors").stat().st_mode & 0o777 == 0o600
        artifact = publish(store, building, manifest_of(*key, building))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {0o664}
