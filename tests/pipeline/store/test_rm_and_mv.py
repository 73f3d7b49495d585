from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.report.select import select_runs
from pipeline.store.collect import pin
from pipeline.store.runs import removal_of, remove_runs, rename_run
from pipeline.store.trash import empty_trash, in_trash
from pipeline.workflow.in_use import recorded
from pipeline.workflow.runs import (
    RECORD,
    config_with,
    is_finished,
    read_run,
    read_runs,
    run_artifacts,
    run_directory,
    run_names,
)
from tests.support.stores import (
    begin,
    collect,
    contents,
    finish,
    key_of,
    keys,
    own,
    planned,
    record,
    stopped_after,
    there,
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The members `mu.0` and `mu.1`, finished, and another run of the first one's settings."""
    for name, group, weight in (("mu.0", "mu", 0.1), ("mu.1", "mu", 0.9), ("other", None, 0.1)):
        finish(
            stage
            for stage in record(tmp_path, name, group, weight=weight).values()
            if key_of(stage) not in there(tmp_path)
        )
    return tmp_path


def test_removing_a_run_takes_what_it_alone_needs(sweep: Path):
    other, second = (keys(record(sweep, name, weight=weight)) for name, weight in (("other", 0.1), ("mu.1", 0.9)))
    before = contents(sweep)
    assert {each.key for each in removal_of(sweep, ["mu.1"], {}).found.going} == second - other
    assert contents(sweep) == before
    remove_runs(sweep, ["mu.1"], {})
    assert sorted(run_names(sweep)) == ["mu.0", "other"]
    assert there(sweep) == there(sweep, "work") == other
    assert empty_trash(sweep) == []
    assert {path: before[path] for path in contents(sweep)} == contents(sweep)


def test_removing_a_sweep_removes_its_members_and_a_run_by_its_side_stays_whole(sweep: Path):
    remove_runs(sweep, ["mu"], {})
    assert run_names(sweep) == ["other"]
    assert is_finished(sweep, read_run(sweep, "other"))
    remove_runs(sweep, ["other"], {})
    assert there(sweep) == there(sweep, "work") == set()


def test_what_an_earlier_config_of_a_removed_run_made_goes_too(tmp_path: Path):
    finish(record(tmp_path, "first").values())
    record(tmp_path, "first", weight=0.9)
    remove_runs(tmp_path, ["first"], {})
    assert there(tmp_path) == there(tmp_path, "work") == set()


def test_a_run_that_is_pinned_or_at_work_is_neither_removed_nor_renamed(tmp_path: Path):
    stages = record(tmp_path, "first")
    begin([stages["clip"]])
    owner = own(stages["clip"])
    before = contents(tmp_path, ["artifacts", "runs"])
    for act in (lambda: remove_runs(tmp_path, ["first"], {}), lambda: rename_run(tmp_path, "first", "second", {})):
        with pytest.raises(UserError, match=r"run first: of its stage clip, process \d+ is at work on it; wait"):
            act()
    owner.release()
    with recorded([planned(tmp_path, "first")]):
        for act in (lambda: remove_runs(tmp_path, ["first"], {}), lambda: rename_run(tmp_path, "first", "second", {})):
            with pytest.raises(UserError, match=r"run first: process \d+ is at work on it; wait"):
                act()
    assert stages["clip"].frozen is not None
    with pytest.raises(UserError, match="run first: of its stage clip, job 3 is PENDING"):
        remove_runs(tmp_path, ["first"], {stages["clip"].frozen.work: "job 3 is PENDING"})
    pin(tmp_path, "first", is_pinned=True)
    with pytest.raises(UserError, match="run first is pinned; unpin it first: unclip gc --unpin first --outputs "):
        remove_runs(tmp_path, ["first"], {})
    assert contents(tmp_path, ["artifacts", "runs"]).keys() >= before.keys()


def test_a_stage_that_a_later_start_works_on_stays_when_an_earlier_run_of_it_is_removed(tmp_path: Path):
    stages = record(tmp_path, "first")
    finish(stages.values())
    with recorded([planned(tmp_path, "second", weight=0.9)]):
        remove_runs(tmp_path, ["first"], {})
    assert there(tmp_path) == keys(stages) - keys(stages, "decoder", "evaluate")


def test_stopped_between_any_two_steps_a_removal_leaves_what_gc_ends(tmp_path: Path):
    kept = record(tmp_path, "kept", width=9)
    finish(kept.values())
    steps = 0
    for steps in range(100):
        finish(each for each in record(tmp_path, "first").values() if key_of(each) not in there(tmp_path))
        with stopped_after(steps) as stopped:
            remove_runs(tmp_path, ["first"], {})
            empty_trash(tmp_path)
        if not stopped.is_set():
            break
        assert run_names(tmp_path) == (["first", "kept"] if steps == 0 else ["kept"])
        assert is_finished(tmp_path, read_run(tmp_path, "kept"))
        if steps > 0:
            collect(tmp_path, keeps_checkpoints=True)
            assert there(tmp_path) == there(tmp_path, "work") == keys(kept)
    assert steps > 10
    assert there(tmp_path) == there(tmp_path, "work") == keys(kept)
    assert in_trash(tmp_path) == []


def test_a_renamed_run_is_found_by_its_new_name_alone_with_all_that_it_had(sweep: Path):
    record(sweep, "other", weight=0.5)
    (run_directory(sweep, "other") / "pictures").mkdir()
    before, order = read_run(sweep, "other"), run_names(sweep)
    assert rename_run(sweep, "other", "best", {}) == {"other": "best"}
    after = read_run(sweep, "best")
    assert (after.name, after.group, after.config["run"]["name"]) == ("best", "best", "best")
    assert after.overrides == ["run.name=best"]
    assert after.stages == before.stages
    assert (run_directory(sweep, "best") / "pictures").is_dir()
    assert run_names(sweep) == [{"other": "best"}.get(each, each) for each in order]
    assert config_with(sweep, "best", "decoder", after.fingerprint_of("decoder") or "") == after.config
    with pytest.raises(UserError, match="no run 'other'"):
        read_run(sweep, "other")
    assert record(sweep, "best", weight=0.5).keys() == {stage.name for stage in after.stages}


def test_a_renamed_sweep_keeps_its_members_and_a_member_that_leaves_it_stays_in_its_group(sweep: Path):
    artifacts = run_artifacts(sweep, read_run(sweep, "mu.1")).keys()
    assert rename_run(sweep, "mu", "nu", {}) == {"mu.0": "nu.0", "mu.1": "nu.1"}
    members = read_runs(sweep, "nu")
    assert [(each.name, each.group, each.overrides) for each in members] == [
        ("nu.0", "nu", ["run.name=nu"]),
        ("nu.1", "nu", ["run.name=nu"]),
    ]
    assert run_artifacts(sweep, members[1]).keys() == artifacts
    rename_run(sweep, "nu.1", "nu.best", {})
    assert [each.name for each in read_runs(sweep, "nu")] == ["nu.0"]
    assert select_runs(sweep, ["sweep:nu"]).members == ("nu.0", "nu.best")


def test_a_rename_that_was_killed_after_the_folder_has_the_name_of_the_folder(sweep: Path):
    for name in ("mu.0", "mu.1"):
        run_directory(sweep, name).rename(run_directory(sweep, name.replace("mu", "nu")))
    assert '"name": "mu.0"' in (run_directory(sweep, "nu.0") / RECORD).read_text()
    assert [(each.name, each.group) for each in read_runs(sweep, "nu")] == [("nu.0", "nu"), ("nu.1", "nu")]
    assert removal_of(sweep, ["nu"], {}).names == ["nu.0", "nu.1"]


@pytest.mark.parametrize(("old", "new", "members"), [("mu", "nu", ["nu.0", "nu.1"]), ("other", "nu", ["nu"])])
def test_a_rename_that_was_stopped_between_any_two_steps_is_ended_by_the_same_command(
    sweep: Path, old: str, new: str, members: list[str], monkeypatch: pytest.MonkeyPatch
):
    steps = 0
    for steps in range(100):
        with monkeypatch.context() as patch:
            stop_after(steps, patch)
            try:
                rename_run(sweep, old, new, {})
                break
            except KeyboardInterrupt:
                pass
        rename_run(sweep, old, new, {})
        assert [each.name for each in read_runs(sweep, new)] == members
        for each in members:
            assert f'"name": "{each}"' in (run_directory(sweep, each) / RECORD).read_text()
            assert [path.name for path in run_directory(sweep, each).iterdir()] == [RECORD]
        rename_run(sweep, new, old, {})
    assert steps == 3 * len(members)


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Stop, as Ctrl-C would, what writes to, renames or removes more than so many files of runs."""
    left = iter(range(steps))

    def stepping(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, *arguments: Any, **named: Any) -> Any:
            if "runs" in path.parts and not path.name.startswith(f".{RECORD}") and next(left, None) is None:
                raise KeyboardInterrupt
            return act(path, *arguments, **named)

        return step

    for name in ("rename", "unlink", "write_text"):
        patch.setattr(Path, name, stepping(getattr(Path, name)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mu.0", "other", "there is a run other already; choose another name than other"),
        ("other", "mu", "there is a run mu.[01] already; choose another name than mu"),
        ("mu", "other", "there is a run other already"),
        ("other", "other", "there is a run other already"),
        ("other", "a/b", "run.name='a/b'"),
        ("other", "../up", "run.name='../up'"),
        ("other", ".hidden", "run.name='.hidden'"),
        ("other", "", "run.name=''"),
        ("other", "x" * 101, "run.name='xxx"),
        ("nothing", "x", "no run 'nothing' under .*; runs there: "),
    ],
)
def test_a_name_that_is_taken_or_is_none_is_refused_and_nothing_is_renamed(sweep: Path, old: str, new: str, said: str):
    before = contents(sweep)
    with pytest.raises(UserError, match=said):
        rename_run(sweep, old, new, {})
    assert contents(sweep) == before
