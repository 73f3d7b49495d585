"""A training job that Slurm disturbs in every way it has goes on, and learns what an undisturbed one learns."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from torch import Tensor

from pipeline.config import NotifySettings
from pipeline.workflow.causes import Cause, read_ends
from pipeline.workflow.frozen import FrozenStage
from tests.support import tiny, world
from tests.support.processes import MEMORY_CGROUP, exhaust_memory_limit

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return world.undisturbed(tmp_path_factory.mktemp("undisturbed"))


def requeue(_stage: FrozenStage, job_id: str) -> None:
    world.slurm("scontrol", "requeue", job_id)


def signal_the_steps(_stage: FrozenStage, job_id: str) -> None:
    world.slurm("scancel", "--signal=USR1", job_id)


def signal_the_script(_stage: FrozenStage, job_id: str) -> None:
    world.slurm("scancel", "--batch", "--signal=USR1", job_id)


def preempt(_stage: FrozenStage, job_id: str) -> None:
    """Jobs of the higher partition take both nodes until the other one has started again."""
    output = world.slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 8")
    world.wait("the preempted job", lambda: world.restarts_of(job_id) > 0)
    world.wait("the urgent job", lambda: world.state_of(output.strip()) == "COMPLETED")


def set_the_node_down(_stage: FrozenStage, job_id: str) -> None:
    node = world.slurm("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    world.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    world.wait("the other start", lambda: world.restarts_of(job_id) > 0)
    bring_back(node)


def exhaust_the_memory(stage: FrozenStage, _job_id: str) -> None:
    (worker,) = workers(stage.outputs)
    assert exhaust_memory_limit(worker)


WITH_LIMITS = pytest.mark.skipif(
    not os.access(MEMORY_CGROUP, os.W_OK), reason="the memory cgroup, version 1, is needed"
)
DISTURBANCES = (
    pytest.param(exhaust_the_memory, Cause.OUT_OF_MEMORY, marks=[pytest.mark.slow, WITH_LIMITS]),
    pytest.param(requeue, Cause.STOPPED, marks=pytest.mark.slow),
    pytest.param(signal_the_steps, Cause.STOPPED, marks=pytest.mark.slow),
    pytest.param(signal_the_script, Cause.STOPPED, marks=pytest.mark.slow),
    (preempt, Cause.STOPPED),
    pytest.param(set_the_node_down, Cause.NODE_FAILURE, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("disturb", "cause"), DISTURBANCES, ids=lambda each: getattr(each, "__name__", None))
def test_a_disturbed_job_ends_with_the_undisturbed_weights_and_its_record_has_the_cause(
    disturb: Callable[[FrozenStage, str], None], cause: Cause, expected: dict[str, Tensor], tmp_path: Path
):
    learner, job_id = world.submitted_learner(tmp_path, step_s=0.2)
    world.wait("two checkpoints", lambda: world.is_training(learner))
    disturb(learner, job_id)
    world.wait("the other start", lambda: world.restarts_of(job_id) > 0)
    world.wait_for_end(learner, job_id)
    assert tiny.are_equal(world.weights_under(tmp_path), expected)
    assert "resuming from samples-" in world.log_of(learner)
    assert read_ends(learner.work)[0].cause is cause


@pytest.mark.slow
def test_a_signal_of_any_form_in_the_seconds_in_which_a_step_starts_costs_nothing(
    expected: dict[str, Tensor], tmp_path: Path
):
    forms = (["--signal=USR1"], ["--signal=USR1", "--full"], ["--signal=USR1", "--batch"], ["--signal=TERM"])
    world.run_stages_here(world.plan(tmp_path, step_s=0.2), "data")
    jobs = world.submit(world.plan(tmp_path, step_s=0.2, note="a"))
    learner, job_id, reader = jobs["learner"].job.stage, jobs["learner"].job_id, jobs["reader"].job_id
    assert job_id is not None
    assert reader is not None
    # First the moment at which there is nothing but a bare interpreter, then others in the seconds of its imports.
    for number, form in enumerate(forms):
        world.wait(f"start {number + 1}", lambda: bool(workers(tmp_path)))
        time.sleep(random.uniform(0.0, 5.0) if number else 0.0)
        world.slurm("scancel", *form, job_id)
        world.wait(f"the end of start {number + 1}", lambda number=number: world.restarts_of(job_id) > number)
    world.wait_for_end(learner, job_id)
    assert tiny.are_equal(world.weights_under(tmp_path), expected)
    assert {each.cause for each in read_ends(learner.work)[:-1]} <= {Cause.STOPPED}
    world.wait("the dependent job", lambda: world.state_of(reader) == "COMPLETED")


@pytest.mark.slow
def test_a_job_that_its_user_cancels_stays_cancelled(tmp_path: Path):
    learner, job_id = world.submitted_learner(tmp_path, step_s=0.5)
    world.wait("two checkpoints", lambda: world.is_training(learner))
    world.slurm("scancel", job_id)
    world.wait("the end", lambda: world.state_of(job_id) == "CANCELLED")
    assert world.restarts_of(job_id) == 0
    assert not world.is_finished(learner)


@pytest.mark.slow
def test_a_job_that_starts_more_often_than_allowed_fails_and_says_so(tmp_path: Path):
    told = tmp_path / "told"
    notify = NotifySettings(command=["tee", str(told)], webhook=None)
    learner, job_id = world.submitted_learner(tmp_path, step_s=0.5, launch={"max_requeues": 0}, notify=notify)
    world.wait("a checkpoint", lambda: world.is_training(learner, 1))
    requeue(learner, job_id)
    world.wait("the end", lambda: world.state_of(job_id) == "FAILED")
    again = world.plan(tmp_path, step_s=0.5).stages[1]
    assert again.action.value == "resume"
    assert "2 times, more than launch.max_requeues=0 allows" in again.reason
    assert "2 times, more than launch.max_requeues=0 allows" in json.loads(told.read_text())["text"]


@pytest.mark.slow
def test_a_start_that_slurm_has_lost_sight_of_cannot_publish_over_the_next_one(
    expected: dict[str, Tensor], tmp_path: Path
):
    learner, job_id = world.submitted_learner(tmp_path, step_s=1.0)
    world.wait("two checkpoints", lambda: world.is_training(learner))
    node = world.slurm("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    daemons = processes(f"slurmd -D -N {node}$")
    # All of Slurm on that node dies, and the stage's process alone goes on, as where a node loses its network.
    (orphan,) = workers(tmp_path)
    own = [*processes(rf"slurmstepd: \[{job_id}\."), *processes(f"/job{job_id:05}/slurm_script"), *processes("^srun ")]
    killed = [psutil.Process(pid) for pid in (*daemons, *own)]
    for process in killed:
        process.kill()
    # A process that is stopped when the last of its session's parents dies is hung up.
    assert psutil.wait_procs(killed, timeout=60)[1] == []
    # It sleeps until the next start has gone on from its checkpoint: on a busy machine it would be done before.
    psutil.Process(orphan).suspend()
    world.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    world.wait("the next start", lambda: "resuming from samples-" in world.log_of(learner))
    psutil.Process(orphan).resume()
    world.wait_for_end(learner, job_id)
    bring_back(node)
    world.wait("the end of the orphan", lambda: not psutil.pid_exists(orphan))
    assert "another process has the stage now" in world.log_of(learner), world.log_of(learner)
    assert tiny.are_equal(world.weights_under(tmp_path), expected)


@pytest.mark.slow
def test_a_real_time_limit_checkpoints_and_requeues(expected: dict[str, Tensor], tmp_path: Path):
    learner, job_id = world.submitted_learner(tmp_path, step_s=3.0, launch={"time_limit_min": 1, "stop_before_s": 20})
    world.wait("the other start", lambda: world.restarts_of(job_id) > 0, timeout_s=180)
    world.wait_for_end(learner, job_id, timeout_s=300)
    assert tiny.are_equal(world.weights_under(tmp_path), expected)
    assert "checkpoint" in world.log_of(learner)


def bring_back(node: str) -> None:
    # A node whose daemon has spoken again is back by itself, and Slurm refuses to resume it.
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False, capture_output=True)
    world.wait(f"{node}", lambda: world.slurm("sinfo", "-h", "-n", node, "-o", "%T").strip() in ("idle", "mixed"))


def workers(outputs: Path) -> list[int]:
    return processes(f"^[^ ]*python -m pipeline.training.worker {outputs}/")


def processes(pattern: str) -> list[int]:
    """Those of this cluster alone, all of which descend from this process: others have nodes of the same names."""
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout
    own = {process.pid for process in psutil.Process().children(recursive=True)}
    return [int(line) for line in found.split() if int(line) in own]
