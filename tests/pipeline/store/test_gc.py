import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.launch.slurm.jobs import JobRecord, write_record
from pipeline.store.collect import find, pin, take_away
from pipeline.store.references import jobs_at_work
from pipeline.store.removable import Found, Kind
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.frozen import ArtifactReference, StageKey, write_frozen
from pipeline.workflow.in_use import recorded
from pipeline.workflow.plan import Action
from pipeline.workflow.progress import CHECKPOINTS
from pipeline.workflow.publish import start_building
from pipeline.workflow.runs import BUILDING, read_run, run_directory
from tests.support.fakes import publish
from tests.support.stores import (
    ALL_AGES,
    Stages,
    begin,
    collect,
    contents,
    finish,
    key_of,
    keys,
    own,
    planned,
    record,
    there,
    with_inputs,
)


def reasons(found: Found) -> dict[tuple[Kind, StageKey | None], str]:
    return {(each.kind, each.key): why for each, why in found.staying}


def test_what_a_run_needs_stays_and_what_none_does_goes(tmp_path: Path, two: tuple[Stages, Stages]):
    first, second = two
    shutil.rmtree(run_directory(tmp_path, "second"))
    before = contents(tmp_path, ["artifacts"])
    collect(tmp_path, keeps_checkpoints=True)
    assert there(tmp_path) == there(tmp_path, "work") == keys(first)
    assert not (keys(second) - keys(first)) & there(tmp_path)
    assert contents(tmp_path, ["artifacts"]).items() <= before.items()


def test_looking_changes_nothing(tmp_path: Path, two: tuple[Stages, Stages]):
    shutil.rmtree(run_directory(tmp_path, "second"))
    before, names = contents(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    assert find(tmp_path, {}, **ALL_AGES).going
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_checkpoints_of_finished_stages_go_and_those_that_a_run_goes_on_from_stay(tmp_path: Path):
    stages = record(tmp_path, "first")
    finish([stages["prepare"], stages["clip"]])
    begin([stages["decoder"]])
    collect(tmp_path, keeps_checkpoints=True)
    assert there(tmp_path, "work", CHECKPOINTS) == keys(stages, "prepare", "clip", "decoder")
    collect(tmp_path)
    assert there(tmp_path, "work", CHECKPOINTS) == keys(stages, "decoder")
    assert there(tmp_path, "work", "log.txt") == keys(stages, "prepare", "clip", "decoder")


def test_what_jobs_of_several_stages_were_told_goes_once_nothing_runs_or_waits(tmp_path: Path):
    work = ArtifactStore(tmp_path).work(*key_of(record(tmp_path, "first")["clip"]))
    work.mkdir(parents=True)
    table = tmp_path / "submitting" / "unclip-0.stages"
    table.parent.mkdir()
    table.touch()
    assert find(tmp_path, {work: "job 7 waits"}, **ALL_AGES).going == []
    collect(tmp_path)
    assert not table.exists()


def test_what_is_young_stays_and_counts_from_when_a_run_ceased_to_need_it(tmp_path: Path):
    before = record(tmp_path, "first")
    finish(before.values())
    age_all(tmp_path, 7200)
    record(tmp_path, "first", weight=0.9)
    assert [each.kind for each in find(tmp_path, {}, **{**ALL_AGES, "older_than_s": 3600.0}).going] == [
        Kind.CHECKPOINTS
    ] * len(with_inputs(before, "clip") | keys(before, "upsampler_1", "upsampler_2"))
    age_all(tmp_path, 7200)
    collect(tmp_path, older_than_s=3600.0)
    assert there(tmp_path) == keys(before) - keys(before, "decoder", "evaluate")


def age_all(outputs: Path, seconds: float) -> None:
    when = time.time() - seconds
    for path in [outputs, *outputs.rglob("*")]:
        os.utime(path, (when, when))


def test_a_pin_keeps_what_earlier_configs_made_and_all_checkpoints(tmp_path: Path):
    before = record(tmp_path, "first")
    finish(before.values())
    now = record(tmp_path, "first", weight=0.9)
    assert pin(tmp_path, "first", is_pinned=True) == ["first"]
    assert find(tmp_path, {}, **ALL_AGES).going == []
    pin(tmp_path, "first", is_pinned=False)
    collect(tmp_path)
    assert there(tmp_path) == keys(before) & keys(now)


def test_an_owner_keeps_its_stage_and_its_inputs_though_no_record_names_them(tmp_path: Path):
    stages = record(tmp_path, "first")
    finish([stages["prepare"], stages["clip"], stages["upsampler_1"]])
    begin([stages["decoder"]])
    shutil.rmtree(run_directory(tmp_path, "first"))
    owner = own(stages["decoder"])
    found = collect(tmp_path)
    assert there(tmp_path) == keys(stages, "prepare", "clip")
    assert there(tmp_path, "work", CHECKPOINTS) == keys(stages, "prepare", "clip", "decoder")
    assert "process" in reasons(found)[Kind.WORK, key_of(stages["decoder"])]
    assert reasons(found)[Kind.ARTIFACT, key_of(stages["clip"])].startswith("decoder needs it: process")
    owner.release()
    collect(tmp_path)
    assert there(tmp_path) == there(tmp_path, "work") == set()


def test_a_command_at_work_keeps_what_it_has_planned_with_though_its_run_was_given_another_config(tmp_path: Path):
    plan = planned(tmp_path, "first")
    with recorded([plan]):
        before = record(tmp_path, "first")
        finish(before.values())
        record(tmp_path, "first", width=5)
        found = find(tmp_path, {}, **ALL_AGES)
        assert found.going == []
        assert set(reasons(found).values()) >= {"a command at work has planned with it"}
    collect(tmp_path)
    assert there(tmp_path) == keys(before, "prepare", "upsampler_1", "upsampler_2")


def test_a_killed_command_keeps_nothing(tmp_path: Path):
    hold = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.workflow.in_use import recorded\n"
        "from tests.support.stores import planned\n"
        "with recorded([planned(Path(sys.argv[1]), 'first')]):\n    print('holds', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        finish(record(tmp_path, "first").values())
        shutil.rmtree(run_directory(tmp_path, "first"))
        assert find(tmp_path, {}, **ALL_AGES).going == []
        process.kill()
    collect(tmp_path)
    assert there(tmp_path) == set()
    assert [path.name for path in (tmp_path / "commands").iterdir()] == ["lock"]


def test_what_came_into_use_after_it_was_found_is_left(tmp_path: Path):
    finish(record(tmp_path, "first").values())
    shutil.rmtree(run_directory(tmp_path, "first"))
    found = find(tmp_path, {}, **ALL_AGES)
    stages = record(tmp_path, "again")
    done = take_away(tmp_path, found.going, {})
    assert done.going == []
    assert {why for _, why in done.staying} == {"run again needs it"}
    assert there(tmp_path) == keys(stages)


def test_a_plan_whose_finished_stage_was_removed_before_it_began_makes_it_anew(tmp_path: Path):
    finish(record(tmp_path, "first").values())
    shutil.rmtree(run_directory(tmp_path, "first"))
    plan = planned(tmp_path, "second")
    assert {stage.action for stage in plan.stages} == {Action.REUSE}
    collect(tmp_path)
    with recorded([plan]) as (made,):
        assert {stage.action for stage in made.stages} == {Action.RUN}


def test_a_job_that_no_queue_can_be_asked_of_keeps_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    stages = record(tmp_path, "first")
    finish([stages["prepare"], stages["clip"]])
    begin([stages["decoder"]])
    job = JobRecord(number=1, token="t", name="n", group="g", wanted_by=["first"], submitted_at="", job_id="3")
    for name in ("clip", "decoder"):
        frozen = stages[name].frozen
        assert frozen is not None
        write_record(frozen.work, job)
    shutil.rmtree(run_directory(tmp_path, "first"))
    jobs = jobs_at_work(tmp_path)
    found = find(tmp_path, jobs, **ALL_AGES)
    assert found.going == []
    why = reasons(found)
    assert why[Kind.WORK, key_of(stages["decoder"])].startswith("of its job Slurm cannot be asked (squeue is not")
    assert why[Kind.ARTIFACT, key_of(stages["clip"])].startswith("decoder needs it: of its job")


def test_where_no_run_is_left_all_goes_that_runs_have_made(tmp_path: Path, two: tuple[Stages, Stages]):
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    collect(tmp_path)
    assert there(tmp_path) == set()


def test_what_is_left_over_beside_an_artifact_goes_unless_its_stage_is_at_work(tmp_path: Path):
    stages = record(tmp_path, "first")
    clip, store = stages["clip"], ArtifactStore(tmp_path)
    building = start_building(store, *key_of(clip), 1)
    (building / "weights").write_bytes(b"half")
    damaged = building.with_name(f".damaged-{clip.fingerprint}-{'0' * 32}")
    damaged.mkdir()
    owner = own(clip)
    assert reasons(find(tmp_path, {}, **ALL_AGES))[Kind.LEFT_OVER, key_of(clip)].startswith("process")
    owner.release()
    collect(tmp_path)
    assert not building.exists()
    assert not damaged.exists()


def test_the_folder_of_a_run_whose_command_was_killed_while_it_made_it_goes(tmp_path: Path):
    stages = record(tmp_path, "first")
    building = tmp_path / "runs" / f"{BUILDING}second.4711"
    building.mkdir()
    (building / "run.json").write_bytes(b"{")
    collect(tmp_path)
    assert not building.exists()
    assert (tmp_path / "runs" / "first" / "run.json").exists()
    assert stages


def test_the_beginning_of_a_record_whose_writer_was_killed_goes_once_nobody_can_be_writing_it(tmp_path: Path):
    stages = record(tmp_path, "first")
    finish(stages.values())
    frozen = stages["clip"].frozen
    assert frozen is not None
    artifact = tmp_path / "artifacts" / "clip" / frozen.fingerprint
    places = (run_directory(tmp_path, "first"), artifact, frozen.work, frozen.work / CHECKPOINTS)
    old, young = ([place / f".{name}.json.123" for place in places] for name in ("old", "young"))
    for path in (*old, *young):
        path.write_bytes(b"{")
    for path in old:
        os.utime(path, (0, 0))
    before = contents(tmp_path)
    collect(tmp_path, keeps_checkpoints=True)
    assert not any(path.exists() for path in old)
    assert contents(tmp_path) == {name: each for name, each in before.items() if not name.endswith("/.old.json.123")}


def test_the_compiler_s_cache_goes_when_asked_for_and_nothing_is_at_work(tmp_path: Path):
    stages = record(tmp_path, "first")
    begin([stages["clip"]])
    cache = tmp_path / "compiler"
    cache.mkdir()
    (cache / "kernel").write_bytes(b"code")
    collect(tmp_path)
    assert cache.exists()
    owner = own(stages["clip"])
    assert (
        "clip uses it" in reasons(find(tmp_path, {}, **{**ALL_AGES, "takes_caches": True}))[Kind.COMPILER_CACHE, None]
    )
    owner.release()
    collect(tmp_path, takes_caches=True)
    assert not cache.exists()


def test_code_stays_that_a_run_was_started_with_or_a_stage_goes_on_with(tmp_path: Path):
    stages = record(tmp_path, "first")
    recorded_code = read_run(tmp_path, "first").code
    frozen = stages["clip"].frozen
    assert recorded_code is not None
    assert frozen is not None
    half_written = f".{'2' * 16}-77"
    for digest in ("1" * 16, "2" * 16, half_written, recorded_code):
        (tmp_path / "code" / digest).mkdir(parents=True)
    write_frozen(frozen.model_copy(update={"code": "1" * 16}))
    assert {each.path.name for each in collect(tmp_path).going} == {"2" * 16, half_written}
    publish(stages["clip"])
    owner = own(stages["clip"])
    assert [each for each in collect(tmp_path).going if each.kind is Kind.CODE] == []
    owner.release()
    assert {each.path.name for each in collect(tmp_path).going if each.kind is Kind.CODE} == {"1" * 16}
    shutil.rmtree(run_directory(tmp_path, "first"))
    assert recorded_code in {each.path.name for each in collect(tmp_path).going}


def test_what_a_stage_starts_from_stays_while_it_is_to_start(tmp_path: Path):
    other, stages = record(tmp_path, "other", width=9), record(tmp_path, "first")
    finish([other["prepare"], other["clip"]])
    frozen, (name, fingerprint) = stages["clip"].frozen, key_of(other["clip"])
    assert frozen is not None
    write_frozen(frozen.model_copy(update={"initial": ArtifactReference(stage=name, fingerprint=fingerprint)}))
    shutil.rmtree(run_directory(tmp_path, "other"))
    collect(tmp_path)
    assert there(tmp_path) == keys(other, "prepare", "clip")
    publish(stages["clip"])
    collect(tmp_path)
    assert there(tmp_path) == keys(stages, "prepare", "clip")


def test_a_link_to_an_artifact_goes_and_what_it_leads_to_stays(tmp_path: Path):
    stages = record(tmp_path / "a", "first")
    finish(stages.values())
    place = ArtifactStore(tmp_path / "b").path(*key_of(stages["clip"]))
    place.parent.mkdir(parents=True)
    place.symlink_to(ArtifactStore(tmp_path / "a").path(*key_of(stages["clip"])))
    (tmp_path / "b" / "runs").mkdir()
    before = contents(tmp_path / "a")
    collect(tmp_path / "b")
    assert not place.is_symlink()
    assert contents(tmp_path / "a") == before


def test_files_of_other_names_are_nobody_s_business(tmp_path: Path):
    others = [tmp_path / each for each in ("notes.txt", "artifacts/clip/mine/a", "work/clip/b", "cache/shard.tar")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    collect(tmp_path, takes_caches=True)
    assert all(path.read_text() == "mine" for path in others)
