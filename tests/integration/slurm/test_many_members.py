"""Members of a sweep as tasks of arrays, and side by side in one job: each stands and falls by itself."""

import os
from collections import Counter
from pathlib import Path

import psutil
import pytest

from pipeline.launch.slurm.status import cancel_runs, job_statuses
from pipeline.workflow.frozen import FrozenStage, frozen_path
from pipeline.workflow.plan import Plan
from pipeline.workflow.runs import read_runs
from tests.support import world

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each question to the controller from now on."""
    found = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo"):
        real = f'PATH="{os.environ["PATH"]}" exec {name} "$@"'
        (programs / name).write_text(f'#!/bin/sh\necho {name} >>"{found}"\n{real}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return found


def submitted(plans: list[Plan]) -> dict[tuple[str, str], str]:
    """Job ids by stage and member."""
    done = world.submit(*plans).values()
    return {(each.job.stage.stage, member): each.job_id or "" for each in done for member in each.job.members}


def frozen(plan: Plan, name: str) -> FrozenStage:
    (found,) = (stage.frozen for stage in plan.stages if stage.name == name)
    assert found is not None
    return found


def states(outputs: Path) -> dict[tuple[str, str], str]:
    return {(each.stage, each.members[0]): each.state for each in job_statuses(outputs, read_runs(outputs, "s"))}


def ended(*job_ids: str) -> bool:
    return not {world.state_of(job_id) for job_id in job_ids} & {"PENDING", "RUNNING", "COMPLETING"}


def test_stages_that_map_one_to_one_are_arrays_and_a_failure_costs_its_own_member_alone(tmp_path: Path, calls: Path):
    outputs, gates = tmp_path / "outputs", [tmp_path / "open", tmp_path / "closed"]
    gates[0].touch()

    def member(number: int) -> Plan:
        launch = {"array_limit": 1}
        return world.plan(
            outputs, f"s.{number}", group="s", seed=number, steps=4, gate=gates[number], note="a", launch=launch
        )

    for number in range(2):
        world.run_stages_here(member(number), "data", "learner")
    ids = submitted([member(0), member(1)])
    assert Counter(calls.read_text().split()) == {"sinfo": 1, "scontrol": 1, "sbatch": 2}
    (array, *_), (other, *_) = ids["gate", "s.0"].split("_"), ids["reader", "s.0"].split("_")
    assert ids == {(name, f"s.{task}"): f"{number}_{task}" for name, number in (("gate", array), ("reader", other))
                   for task in range(2)}  # fmt: skip
    assert f"aftercorr:{array}" in world.slurm("scontrol", "show", "job", f"{other}_1", "--oneliner")
    most = 0

    def is_over() -> bool:
        nonlocal most
        most = max(most, [world.state_of(f"{array}_{task}") for task in range(2)].count("RUNNING"))
        return ended(*ids.values())

    world.wait("the sweep", is_over, timeout_s=900)
    assert most == 1
    calls.unlink()
    found = states(outputs)
    assert Counter(calls.read_text().split()) == {"squeue": 1}
    assert (found["gate", "s.0"], found["reader", "s.0"]) == ("finished", "finished")
    assert found["gate", "s.1"] == "FAILED"
    assert found["reader", "s.1"].startswith("CANCELLED")
    again = submitted([member(0), member(1)])
    assert set(again) == {("gate", "s.1"), ("reader", "s.1")}
    cancel_runs(outputs, read_runs(outputs, "s"))


def test_a_stage_that_fails_costs_neither_those_beside_it_nor_what_waits_for_them(tmp_path: Path):
    sufferings: list[int | str] = ["permission", 1]

    def member(number: int) -> Plan:
        launch = {"members_per_job": 2, "mem_gib": 1.0}
        return world.plan(tmp_path, f"s.{number}", group="s", steps=4, suffers=sufferings[number], launch=launch)

    world.run_stages_here(member(0), "data", "learner")
    job_id, other = submitted([member(0), member(1)]).values()
    assert job_id == other
    assert "MinMemoryNode=2G" in world.slurm("scontrol", "show", "job", job_id, "--oneliner")
    world.wait("the end", lambda: ended(job_id), timeout_s=900)
    assert world.state_of(job_id) == "COMPLETED"
    assert states(tmp_path) == {("sufferer", "s.0"): "failed", ("sufferer", "s.1"): "finished"} | {
        ("data", "s.0"): "finished", ("learner", "s.0"): "finished"
    }  # fmt: skip
    (status, _) = (each for each in job_statuses(tmp_path, read_runs(tmp_path, "s")) if each.stage == "sufferer")
    assert (status.reason, world.restarts_of(job_id)) == ("permission", 0)
    assert "give this user the right to it" in status.detail
    assert set(submitted([member(0), member(1)])) == {("sufferer", "s.0")}
    cancel_runs(tmp_path, read_runs(tmp_path, "s"))


def test_behind_a_shared_job_a_member_whose_input_is_missing_says_so_and_the_other_one_goes_on(tmp_path: Path):
    outputs, gates = tmp_path / "outputs", [tmp_path / "open", tmp_path / "closed"]
    gates[0].touch()

    def member(number: int) -> Plan:
        launch = {"members_per_job": 2, "mem_gib": 1.0}
        return world.plan(
            outputs, f"s.{number}", group="s", seed=number, steps=4, gate=gates[number], note="a", launch=launch
        )

    members = [member(0), member(1)]
    for each in members:
        world.run_stages_here(each, "data", "learner")
    ids = submitted([member(0), member(1)])
    assert len(set(ids.values())) == 2
    world.wait("the sweep", lambda: ended(*ids.values()), timeout_s=900)
    found = states(outputs)
    assert (found["gate", "s.0"], found["reader", "s.0"]) == ("finished", "finished")
    assert (found["gate", "s.1"], found["reader", "s.1"]) == ("failed", "failed")
    assert "stage reader needs the artifact gate/" in world.log_of(frozen(members[1], "reader"))
    gates[1].touch()
    again = submitted([member(0), member(1)])
    assert set(again) == {("gate", "s.1"), ("reader", "s.1")}
    world.wait("the rest", lambda: ended(*again.values()), timeout_s=900)
    found = states(outputs)
    assert (found["gate", "s.1"], found["reader", "s.1"]) == ("finished", "finished")


def test_stages_side_by_side_go_on_from_their_checkpoints_when_their_job_starts_again_and_one_can_be_cancelled(
    tmp_path: Path,
):
    def member(number: int) -> Plan:
        launch = {"members_per_job": 2, "mem_gib": 1.0}
        return world.plan(tmp_path, f"s.{number}", group="s", seed=number, step_s=1.0, launch=launch)

    world.run_stages_here(member(0), "data")
    members = [member(0), member(1)]
    world.run_stages_here(members[1], "data")
    (job_id,) = set(submitted(members).values())
    one, other = (frozen(plan, "learner") for plan in members)
    world.wait("training", lambda: world.is_training(one) and world.is_training(other), timeout_s=900)
    world.slurm("scontrol", "requeue", job_id)
    for learner in (one, other):
        world.wait(
            "the other start", lambda learner=learner: "resuming from samples-" in world.log_of(learner), timeout_s=900
        )
    cancelled = cancel_runs(tmp_path, read_runs(tmp_path, "s.0"))
    assert cancelled.cancelled == (("learner", job_id),)
    world.wait("the end", lambda: ended(job_id), timeout_s=900)
    assert world.state_of(job_id) == "COMPLETED"
    found = states(tmp_path)
    assert (found["learner", "s.0"], found["learner", "s.1"]) == ("cancelled", "finished")
    assert "cancelled" in world.log_of(one)
    assert set(submitted([member(0), member(1)])) == {("learner", "s.0")}
    cancel_runs(tmp_path, read_runs(tmp_path, "s"))


def test_a_stage_that_fails_for_good_can_be_submitted_anew_while_those_beside_it_go_on(tmp_path: Path):
    def member(number: int) -> Plan:
        launch = {"members_per_job": 2, "mem_gib": 1.0}
        return world.plan(tmp_path, f"s.{number}", group="s", seed=number, step_s=2.0, launch=launch)

    for number in range(2):
        world.run_stages_here(member(number), "data")
    members = [member(0), member(1)]
    (job_id,) = set(submitted(members).values())
    one, other = (frozen(plan, "learner") for plan in members)
    world.wait("training", lambda: world.is_training(one) and world.is_training(other), timeout_s=900)
    running = [each for each in psutil.process_iter(["cmdline"]) if str(frozen_path(one)) in each.info["cmdline"]]
    (worker,) = (each for each in running if "python" in each.info["cmdline"][0])
    worker.kill()
    world.wait("the failure", lambda: states(tmp_path)["learner", "s.0"] == "failed", timeout_s=900)
    assert states(tmp_path)["learner", "s.1"] == world.state_of(job_id) == "RUNNING"
    again = submitted([member(0), member(1)])
    assert again["learner", "s.1"] == job_id
    assert again["learner", "s.0"] not in (job_id, "")
    cancel_runs(tmp_path, read_runs(tmp_path, "s"))
