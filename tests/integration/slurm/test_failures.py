"""What follows a failure in a real job: its cause is named, and it starts again with what its cause asks for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch.slurm.status import job_statuses
from pipeline.workflow.causes import Cause, read_ends
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.runs import read_runs
from tests.support import world

pytestmark = pytest.mark.usefixtures("cluster")

MEMORY_CGROUP = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def submitted(outputs: Path, suffers: int | str, **launch: object) -> tuple[FrozenStage, str]:
    changes = {"suffers": suffers, "launch": launch}
    made = world.plan(outputs, **changes)
    world.run_stages_here(made, "data", "learner")
    (sufferer,) = (stage.frozen for stage in made.stages if stage.name == "sufferer")
    job_id = world.submit(world.plan(outputs, **changes))["sufferer"].job_id
    assert sufferer is not None
    assert job_id is not None
    return sufferer, job_id


def shown(job_id: str, name: str) -> str:
    return world.slurm("scontrol", "show", "job", job_id, "--oneliner").partition(f"{name}=")[2].split()[0]


@pytest.mark.slow
@pytest.mark.skipif(not MEMORY_CGROUP.exists(), reason="Slurm's own memory limit needs the memory cgroup, version 1")
def test_a_stage_that_slurm_ends_for_its_memory_starts_again_with_more_until_it_has_enough(tmp_path: Path):
    # torch's imports take less than this, and what the stage asks for on top takes more.
    stage, job_id = submitted(tmp_path, 900, mem_gib=0.8)
    world.wait("the second start", lambda: world.restarts_of(job_id) > 0)
    (status,) = (each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial")) if each.stage == "sufferer")
    assert "out of memory: starts again (1 of 3) with MinMemoryNode=1228" in status.detail
    world.wait_for_end(stage, job_id)
    assert {end.cause for end in read_ends(stage.work)[:-1]} == {Cause.OUT_OF_MEMORY}
    assert shown(job_id, "MinMemoryNode") != "819M"


@pytest.fixture
def _partition_of_1000_mib(cluster: None) -> Iterator[None]:
    conf = Path(os.environ["SLURM_CONF"])
    before = conf.read_text()
    try:
        conf.write_text(before.replace("PartitionName=main ", "PartitionName=main MaxMemPerNode=1000 "))
        world.slurm("scontrol", "reconfigure")
        yield
    finally:
        conf.write_text(before)
        world.slurm("scontrol", "reconfigure")


@pytest.mark.slow
@pytest.mark.usefixtures("_partition_of_1000_mib")
@pytest.mark.skipif(not MEMORY_CGROUP.exists(), reason="Slurm's own memory limit needs the memory cgroup, version 1")
def test_memory_is_raised_to_what_the_partition_allows_and_no_further(tmp_path: Path):
    stage, job_id = submitted(tmp_path, 1200, mem_gib=0.8)
    world.wait("the end", lambda: world.state_of(job_id) == "FAILED")
    assert (shown(job_id, "MinMemoryNode"), world.restarts_of(job_id)) == ("1000M", 1)
    assert "no node here gives more than 1000 MiB and there is no micro-batch to halve" in world.log_of(stage)
    assert not world.is_finished(stage)


@pytest.mark.slow
def test_a_failure_that_may_be_the_node_s_own_is_tried_again_and_after_two_on_another_node(tmp_path: Path):
    stage, job_id = submitted(tmp_path, "connection")
    world.wait_for_end(stage, job_id)
    first, second, last = read_ends(stage.work)
    assert (first.cause, second.cause, last.cause) == (Cause.COLLECTIVE, Cause.COLLECTIVE, None)
    if first.nodes == second.nodes:
        assert second.then == f"starts again (2 of 3) with ExcNodeList={first.nodes}"
        assert last.nodes != first.nodes


@pytest.mark.slow
def test_a_failure_that_no_start_mends_ends_the_job_and_its_cause_is_shown(tmp_path: Path):
    stage, job_id = submitted(tmp_path, "permission")
    world.wait("the end", lambda: world.state_of(job_id) == "FAILED")
    (status,) = (each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial")) if each.stage == "sufferer")
    assert (status.reason, world.restarts_of(job_id)) == ("permission", 0)
    assert "give this user the right to it" in status.detail
    assert not world.is_finished(stage)


@pytest.mark.slow
def test_a_stage_that_comes_to_no_step_boundary_is_ended_before_its_limit_and_starts_again_with_a_longer_one(
    tmp_path: Path,
):
    limits = {"time_limit_min": 1, "stop_before_s": 45}
    learner, job_id = world.submitted_learner(tmp_path, step_s=600.0, launch=limits)
    world.wait("the second start", lambda: world.restarts_of(job_id) > 0, timeout_s=300)
    end = read_ends(learner.work)[0]
    assert (end.cause, end.then) == (Cause.TIME_LIMIT, "starts again (1 of 2) with TimeLimit=2")
    world.wait("the change", lambda: shown(job_id, "TimeLimit") == "00:02:00")
    world.slurm("scancel", job_id)
