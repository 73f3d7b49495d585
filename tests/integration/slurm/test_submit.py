"""Runs and sweeps as jobs of a real cluster: what is submitted, shared, depended on, cancelled and shown."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import StrategyName
from pipeline.errors import UserError
from pipeline.launch.slurm.jobs import latest_record
from pipeline.launch.slurm.status import cancel_runs, job_statuses
from pipeline.launch.slurm.submit import Submission, SubmittedStage
from pipeline.store.references import jobs_at_work
from pipeline.store.runs import remove_runs
from pipeline.workflow.runs import read_runs, run_directory
from pipeline.workflow.sealed import read_json, write_json_atomically
from tests.support import tiny, world

pytestmark = pytest.mark.usefixtures("cluster")

TWO = {"max_parallel": 2}


def jobs_of(done: dict[str, SubmittedStage]) -> dict[str, str]:
    return {name: each.job_id for name, each in done.items() if each.job_id is not None}


def wait_for(*job_ids: str, state: str = "COMPLETED") -> None:
    for job_id in job_ids:
        world.wait(f"job {job_id} to be {state}", lambda job_id=job_id: world.state_of(job_id) == state)


def dependency(job_id: str) -> str:
    shown = world.slurm("scontrol", "show", "job", job_id, "--oneliner")
    return shown.partition("Dependency=")[2].split()[0]


@pytest.mark.slow
def test_a_failed_stage_takes_its_descendants_along_and_the_same_submission_makes_up_for_them(tmp_path: Path):
    gate = tmp_path / "gate"
    world.run_stages_here(world.plan(tmp_path, steps=4), "data", "learner")
    first = jobs_of(world.submit(world.plan(tmp_path, steps=4, note="a", gate=gate)))
    assert set(first) == {"gate", "reader"}
    assert f"afterok:{first['gate']}" in dependency(first["reader"])
    wait_for(first["gate"], state="FAILED")
    wait_for(first["reader"], state="CANCELLED")
    statuses = {each.stage: each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial"))}
    assert statuses["gate"].state == "FAILED"
    assert statuses["gate"].detail == "the gate is closed; open it"
    assert statuses["reader"].state.startswith("CANCELLED")
    gate.touch()
    again = world.submit(world.plan(tmp_path, steps=4, note="a", gate=gate))
    assert {name: each.submission for name, each in again.items()} == {
        "gate": Submission.SUBMITTED,
        "reader": Submission.SUBMITTED,
    }
    wait_for(*jobs_of(again).values())
    assert world.submit(world.plan(tmp_path, steps=4, note="a", gate=gate)) == {}


@pytest.mark.slow
def test_stages_in_the_queue_are_depended_on_and_never_submitted_twice(tmp_path: Path):
    world.run_stages_here(world.plan(tmp_path, "one", steps=4, step_s=0.3), "data")
    first = jobs_of(world.submit(world.plan(tmp_path, "one", steps=4, note="a", step_s=0.3)))
    second = world.submit(world.plan(tmp_path, "two", steps=4, note="b", step_s=0.3))
    assert {name: each.submission for name, each in second.items()} == {
        "learner": Submission.QUEUED,
        "reader": Submission.SUBMITTED,
    }
    assert jobs_of(second)["learner"] == first["learner"]
    assert second["reader"].after == (first["learner"],)
    # The first run's wish goes; what the second one counts on stays.
    cancelled = cancel_runs(tmp_path, read_runs(tmp_path, "one"))
    assert [stage for stage, _ in cancelled.cancelled] == ["reader"]
    assert {stage for stage, _, _ in cancelled.kept} == {"learner"}
    wait_for(jobs_of(second)["reader"])
    assert world.state_of(first["reader"]) == "CANCELLED"


def test_a_job_that_waits_for_one_that_is_gone_is_submitted_anew_with_it(tmp_path: Path):
    hold = {"stages": {"learner": {"sbatch_arguments": ["--hold"]}}}
    first = jobs_of(world.submit(world.plan(tmp_path, steps=4, note="a", launch=hold)))
    world.slurm("scancel", first["learner"])
    again = world.submit(world.plan(tmp_path, steps=4, note="a"))
    assert again["learner"].submission is Submission.SUBMITTED
    assert again["reader"].submission is Submission.SUBMITTED
    assert again["reader"].after == (again["learner"].job_id,)
    wait_for(first["reader"], state="CANCELLED")
    cancel_runs(tmp_path, read_runs(tmp_path, "trial"))


@pytest.mark.slow
def test_two_sweeps_submitted_at_the_same_moment_share_their_stages(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from tests.support import world\n"
        "out, name = Path(sys.argv[1]), sys.argv[2]\n"
        "plans = [world.plan(out, f'{name}.{n}', group=name, steps=4, seed=5, note=f'{name} {n}') for n in (0, 1)]\n"
        "world.submit(*plans)"
    )

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name])

    before = world.slurm("squeue", "-h", "--array", "-t", "all", "-o", "%i").split()
    both = [start("left"), start("right")]
    assert [each.wait(timeout=120) for each in both] == [0, 0]
    records = [record for name in ("left", "right") for record in read_runs(tmp_path, name)]
    statuses = job_statuses(tmp_path, records)
    assert sorted(each.stage for each in statuses) == ["data", "learner", "reader", "reader", "reader", "reader"]
    ids = [each.job_id for each in statuses]
    after = world.slurm("squeue", "-h", "--array", "-t", "all", "-o", "%i").split()
    assert sorted(set(after) - set(before)) == sorted(job_id for job_id in ids if job_id is not None)
    wait_for(*(job_id for job_id in ids if job_id is not None))
    assert len(list(tmp_path.glob("artifacts/learner/*/manifest.json"))) == 1
    # Trained once: one attempt at the stage that all four share.
    assert len(list(tmp_path.glob("work/learner/*/attempts/*.json"))) == 1


@pytest.mark.slow
def test_at_most_so_many_jobs_of_a_sweep_run_at_a_time(tmp_path: Path):
    world.run_stages_here(world.plan(tmp_path), "data")
    plans = [world.plan(tmp_path, f"s.{n}", group="s", steps=4, seed=n, step_s=0.2, launch=TWO) for n in range(3)]
    ids = list(jobs_of(world.submit(*plans)).values())
    assert len(ids) == 3
    most = 0

    def all_done() -> bool:
        nonlocal most
        states = [world.state_of(job_id) for job_id in ids]
        most = max(most, states.count("RUNNING"))
        return states.count("COMPLETED") == len(ids)

    world.wait("the sweep", all_done, timeout_s=240)
    assert most == 2


def test_resubmitting_finds_a_job_whose_submission_was_killed_before_it_knew_the_id(tmp_path: Path):
    learner, job_id = world.submitted_learner(tmp_path, steps=4, step_s=0.5)
    (record,) = (learner.work / "jobs").glob("*.json")
    write_json_atomically(record, {**read_json(record), "job_id": None})
    again = world.submit(world.plan(tmp_path, steps=4, step_s=0.5))["learner"]
    assert (again.submission, again.job_id) == (Submission.QUEUED, job_id)
    world.wait_for_end(learner, job_id)


def test_a_job_that_finds_an_input_damaged_fails_with_the_command_that_mends_it(tmp_path: Path):
    made = world.plan(tmp_path, steps=4, note="a")
    world.run_stages_here(made, "data", "learner")
    (weights,) = tmp_path.glob("artifacts/learner/*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    reader = world.submit(world.plan(tmp_path, steps=4, note="a"))["reader"]
    assert reader.job_id is not None
    wait_for(reader.job_id, state="FAILED")
    (status,) = (each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial")) if each.stage == "reader")
    assert "unclip submit run.name=trial" in status.detail
    assert "stage learner is set aside; this makes it anew" in status.detail


def test_a_job_whose_inputs_are_gone_fails_with_the_reason(tmp_path: Path):
    learner, _ = world.submitted_learner(tmp_path / "a", steps=4, launch={"sbatch_arguments": ["--hold"]})
    for artifact in (tmp_path / "a" / "artifacts" / "data").iterdir():
        shutil.rmtree(artifact)
    (job_id,) = world.slurm("squeue", "-h", "-t", "PD", "-o", "%A").split()
    world.slurm("scontrol", "release", job_id)
    wait_for(job_id, state="FAILED")
    reason = world.plan(tmp_path / "a", steps=4).stages[1].reason
    assert "needs the artifact data/" in reason
    assert not world.is_finished(learner)


@pytest.mark.slow
def test_what_a_job_needs_is_neither_collected_nor_removed_and_it_ends_well(tmp_path: Path):
    made = world.plan(tmp_path, steps=4, note="a", launch={"sbatch_arguments": ["--hold"]})
    world.run_stages_here(made, "data", "learner")
    (job_id,) = jobs_of(
        world.submit(world.plan(tmp_path, steps=4, note="a", launch={"sbatch_arguments": ["--hold"]}))
    ).values()
    with pytest.raises(UserError, match=f"run trial: of its stage reader, job {job_id} is PENDING; wait for its end"):
        remove_runs(tmp_path, ["trial"], jobs_at_work(tmp_path))
    shutil.rmtree(run_directory(tmp_path, "trial"))
    assert main([*["gc", "--older-than", "0m", "--delete", "--outputs"], str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("artifacts/*/*/manifest.json"))) == 2
    world.slurm("scontrol", "release", job_id)
    wait_for(job_id)
    assert main([*["gc", "--older-than", "0m", "--delete", "--outputs"], str(tmp_path)]) == 0
    assert list(tmp_path.glob("artifacts/*/*/manifest.json")) == []


def test_names_that_a_shell_would_read_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "-rf a'b\"c $(touch pwned) `touch pwned`; touch pwned\n%j%%x \\ é"
    environment = {"QUOTED": 'it\'s $(touch pwned) "x"\n`touch pwned`'}
    learner, job_id = world.submitted_learner(outputs, steps=4, launch={"environment": environment})
    world.wait_for_end(learner, job_id)
    assert "on node" in world.log_of(learner)
    assert not list(tmp_path.rglob("pwned"))
    assert [path.name for path in tmp_path.iterdir()] == [outputs.name]


def test_what_slurm_refuses_is_said_in_its_words_and_what_was_submitted_is_taken_up(tmp_path: Path):
    refused = world.plan(tmp_path, steps=4, launch={"stages": {"learner": {"partition": "none such"}}})
    with pytest.raises(UserError, match=r"stage learner: .*partition.*before it: 1 submitted"):
        world.submit(refused)
    states = {each.stage: each.state for each in job_statuses(tmp_path, read_runs(tmp_path, "trial"))}
    assert states["learner"] == "not submitted"
    again = world.submit(world.plan(tmp_path, steps=4))
    assert again["learner"].submission is Submission.SUBMITTED
    cancel_runs(tmp_path, read_runs(tmp_path, "trial"))
    before = latest_record(again["learner"].job.stage.work)
    with pytest.raises(UserError, match="bogus"):
        world.submit(world.plan(tmp_path, steps=4, launch={"sbatch_arguments": ["--bogus"]}))
    assert latest_record(again["learner"].job.stage.work) == before
    assert before is not None
    assert before.job_id == again["learner"].job_id


def test_more_time_than_the_partition_gives_is_refused_before_anything_is_submitted(tmp_path: Path):
    asks = {"partition": "short", "stages": {"learner": {"time_limit_min": 1506}}}
    with pytest.raises(
        UserError, match=r"time_limit_min=1506 of stage learner .* short .*1505 min.*learner.time_limit"
    ):
        world.submit(world.plan(tmp_path, steps=4, launch=asks))
    of_all = {"partition": "short", "time_limit_min": 1506}
    with pytest.raises(UserError, match=r"use launch\.time_limit_min=1505 or less"):
        world.submit(world.plan(tmp_path, steps=4, launch=of_all))
    assert not (tmp_path / "work").exists()
    asks["stages"] = {"learner": {"time_limit_min": 1505}}
    world.submit(world.plan(tmp_path, steps=4, launch={**asks, "sbatch_arguments": ["--hold"]}))
    cancel_runs(tmp_path, read_runs(tmp_path, "trial"))


def test_jobs_of_other_people_may_be_called_whatever_they_like(tmp_path: Path):
    odd = world.slurm(
        "sbatch", "--parsable", "--hold", "--job-name=a\nb|7\r\n", "--comment=\n1|x", "--wrap", "true"
    ).strip()
    learner, job_id = world.submitted_learner(tmp_path, steps=4, launch={"sbatch_arguments": ["--hold"]})
    (record,) = (learner.work / "jobs").glob("*.json")
    write_json_atomically(record, {**read_json(record), "job_id": None})
    assert world.submit(world.plan(tmp_path, steps=4))["learner"].job_id == job_id
    assert [each for _, each in cancel_runs(tmp_path, read_runs(tmp_path, "trial")).cancelled] == [job_id]
    assert world.state_of(odd) == "PENDING"
    world.slurm("scancel", odd)


@pytest.mark.slow
def test_a_job_that_slurm_holds_after_a_failed_launch_is_released_elsewhere_and_counted(tmp_path: Path):
    conf = Path(os.environ["SLURM_CONF"])
    prolog = conf.parent / "prolog"
    prolog.write_text("#!/bin/sh\n[ $SLURMD_NODENAME != node1 ]\n")
    prolog.chmod(0o755)
    before = conf.read_text()
    try:
        conf.write_text(f"{before}\nProlog={prolog}\n")
        world.slurm("scontrol", "reconfigure")
        made = world.plan(tmp_path, steps=4, launch={"sbatch_arguments": ["--nodelist=node1"]})
        world.run_stages_here(made, "data")
        job = world.submit(made)["learner"]
        assert job.job_id is not None
        held = "launch failed requeued held"
        world.wait(
            "the failed launch", lambda: world.reason_of(job.job_id or "").replace("_", " ") == held, releases=False
        )
        world.slurm("scontrol", "update", f"JobId={job.job_id}", "ReqNodeList=")
        (status,) = (each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial")) if each.stage == "learner")
        assert "launch: released" in status.detail
        world.wait_for_end(job.job.stage, job.job_id)
        assert "on node2" in world.log_of(job.job.stage)
    finally:
        conf.write_text(before)
        world.slurm("scontrol", "reconfigure")
        subprocess.run(["scontrol", "update", "NodeName=node1", "State=RESUME"], check=False)


def test_the_jobs_ask_for_what_their_profile_says(tmp_path: Path):
    stages = {"learner": {"gpu_request": "gpus-per-node", "mem_gib": 1.5, "time_limit_min": 7}}
    hold = {"sbatch_arguments": ["--hold"], "stages": stages}
    ids = jobs_of(world.submit(world.plan(tmp_path, steps=4, launch=hold)))
    shown = world.slurm("scontrol", "show", "job", ids["learner"], "--oneliner")
    for asked in ("TimeLimit=00:07:00", "MinMemoryNode=1.50G", "TresPerNode=gres:gpu:1", "Requeue=1"):
        assert asked in shown
    assert "gres" not in world.slurm("scontrol", "show", "job", ids["data"], "--oneliner")
    cancel_runs(tmp_path, read_runs(tmp_path, "trial"))
    wait_for(*ids.values(), state="CANCELLED")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_stage_on_two_nodes_learns_what_two_processes_of_one_machine_learn(tmp_path: Path, strategy: str):
    here = world.plan(tmp_path / "here", steps=12, is_local=True, devices=2, strategy=StrategyName(strategy))
    world.run_stages_here(here, "data")
    learner = here.stages[1].frozen
    assert learner is not None
    command = [sys.executable, "-m", "pipeline.training.worker", str(world.write(learner))]
    subprocess.run(command, check=True, env={**os.environ})
    stage, job_id = world.submitted_learner(
        tmp_path / "there",
        steps=12,
        step_s=0.2,
        num_nodes=2,
        checkpoint_every_samples=None,
        strategy=StrategyName(strategy),
    )
    world.wait("training", (stage.work / "in-step").exists)
    nodes = world.slurm("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    assert nodes == "node[1-2]"
    world.slurm("scancel", "--signal=USR1", job_id)
    world.wait("the other start", lambda: world.restarts_of(job_id) > 0)
    world.wait_for_end(stage, job_id)
    # Two processes, and two starts.
    assert world.log_of(stage).count(f"training by {strategy} on 2 devices") == 4
    (stopped_at,) = set(re.findall(r"stopped at (\d+) samples", world.log_of(stage)))
    assert f"resuming from samples-{int(stopped_at):012}" in world.log_of(stage)
    assert tiny.are_equal(world.weights_under(tmp_path / "there"), world.weights_under(tmp_path / "here"))


def test_the_commands_tell_of_a_submitted_run_from_first_to_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    option = ["--outputs", str(tmp_path)]
    made = world.plan(tmp_path, steps=100, step_s=0.5, note="a")
    world.run_stages_here(made, "data")
    ids = jobs_of(world.submit(world.plan(tmp_path, steps=100, step_s=0.5, note="a")))
    world.wait("training", lambda: world.state_of(ids["learner"]) == "RUNNING")
    assert main(["status", "trial", *option]) == 0
    shown = capsys.readouterr().out
    assert "RUNNING" in shown
    assert "Dependency" in shown
    world.wait("a checkpoint", lambda: bool(list(tmp_path.glob("work/learner/*/checkpoints/*.json"))))
    assert main(["logs", "trial", "learner", *option]) == 0
    assert "on node" in capsys.readouterr().out
    assert main(["cancel", "trial", *option]) == 0
    assert f"cancelled learner, job {ids['learner']}" in capsys.readouterr().out
    wait_for(ids["learner"], ids["reader"], state="CANCELLED")
    monkeypatch.setenv("PATH", "")
    assert main(["status", "trial", *option]) == 0
    assert "from files alone, as squeue is not installed here" in capsys.readouterr().out


def test_many_threads_of_submission_leave_one_job_per_stage(tmp_path: Path):
    plans = [world.plan(tmp_path, f"run{n}", steps=4, launch={"sbatch_arguments": ["--hold"]}) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ids = [jobs_of(done) for done in pool.map(world.submit, plans)]
    assert all(each == ids[0] for each in ids)
    cancel_runs(tmp_path, [record for n in range(4) for record in read_runs(tmp_path, f"run{n}")])


@pytest.mark.slow
def test_status_knows_of_jobs_that_have_left_the_queue(tmp_path: Path):
    made = world.plan(tmp_path, steps=4, gate=tmp_path / "gate")
    ids = jobs_of(world.submit(made))
    wait_for(ids["gate"], state="FAILED")
    wait_for(ids["learner"])
    conf = Path(os.environ["SLURM_CONF"])
    long = conf.read_text()
    try:
        conf.write_text(long.replace("MinJobAge=900", "MinJobAge=2"))
        world.slurm("scontrol", "reconfigure")
        world.wait("the queue to forget", lambda: world.state_of(ids["gate"]) == "", timeout_s=180)
        statuses = {each.stage: each for each in job_statuses(tmp_path, read_runs(tmp_path, "trial"))}
    finally:
        conf.write_text(long)
        world.slurm("scontrol", "reconfigure")
    # In Slurm's words where there is accounting, else in those that the stage has left.
    assert statuses["gate"].state == ("FAILED" if "slurmdbd" in long else "failed")
    assert statuses["gate"].detail == "the gate is closed; open it"
    assert statuses["learner"].state == "finished"
    again = world.submit(world.plan(tmp_path, steps=4, gate=tmp_path / "gate"))
    assert again["gate"].submission is Submission.SUBMITTED
    wait_for(jobs_of(again)["gate"], state="FAILED")
