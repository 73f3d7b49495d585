"""A stage on two processes (DDP over gloo): killed, signalled, and resumed on another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import StrategyName
from pipeline.launch.local.worker import Worker
from pipeline.training.stage import run_stage
from pipeline.workflow.causes import Cause
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure
from pipeline.workflow.record import without_measured
from tests.support import ROOT, tiny
from tests.support.ranks import log_of, run_on_ranks
from tests.support.tiny_runs import plan_stages

STEPS = 40


def learner(
    outputs: Path,
    *,
    devices: int = 2,
    dropout: float = 0.3,
    strategy: str = "ddp",
    collective_timeout_s: float = 60.0,
    hang_after_s: float | None = None,
) -> FrozenStage:
    """Forty steps of 8 samples in micro-batches, with a loader worker in each process."""
    stage = tiny.frozen(
        outputs, strategy=StrategyName(strategy), dropout=dropout,
        max_samples=8 * STEPS, step_s=0.02, devices=devices, loader_workers=1,
        log_every_steps=3, micro_batch_size=2, checkpoint_every_samples=24, collective_timeout_s=collective_timeout_s,
        hang_after_s=hang_after_s,
    )  # fmt: skip
    run_stage(tiny.data_of(stage), Event())
    return stage


def start(stage: FrozenStage) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(stage: FrozenStage) -> None:
    assert start(stage).wait(timeout=300) == 0, (stage.work / "log.txt").read_text()


def wait_for_checkpoint(stage: FrozenStage, process: subprocess.Popen[bytes], after: int) -> int:
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        samples = latest_checkpoint_samples(stage.work) or 0
        if samples > after:
            return samples
        assert process.poll() is None, (stage.work / "log.txt").read_text()
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


def processes(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train, without their loader workers; the first one leads."""
    of_all = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return [each for each in of_all if "pipeline.training.worker" in each.cmdline() and _is_rank(each, of_all)]


def _is_rank(each: psutil.Process, of_all: list[psutil.Process]) -> bool:
    """A loader worker is a fork: it has its parent's environment, and a rank has a rank of its own."""
    parent = next((other for other in of_all if other.pid == each.ppid()), None)
    return parent is None or each.environ().get("LOCAL_RANK") != parent.environ().get("LOCAL_RANK")


def rows(stage: FrozenStage) -> list[dict[str, float]]:
    return [without_measured(row) for row in tiny.rows(stage)]


def require_the_bits_of(undisturbed: FrozenStage, stage: FrozenStage) -> None:
    """A stage that was stopped before its end has, when it is finished, weights and rows of one that was not."""
    stopped_at = latest_checkpoint_samples(stage.work)
    assert stopped_at is not None
    assert stopped_at < 8 * STEPS
    finish(stage)
    assert tiny.are_equal(tiny.weights(stage), tiny.weights(undisturbed))
    assert json.dumps(rows(stage)) == json.dumps(rows(undisturbed))


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_its_host_long_before_the_collective_s_time_out(tmp_path: Path):
    stage = learner(tmp_path, collective_timeout_s=1800.0, hang_after_s=5.0)
    process = start(stage)
    wait_for_checkpoint(stage, process, after=24)
    first, second = processes(process)
    second.suspend()
    assert process.wait(timeout=120) == 1
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.cause is Cause.COLLECTIVE
    assert f": process 1 on {socket.gethostname()}, " in failure.message
    second.resume()
    psutil.wait_procs([first, second], timeout=60)
    finish(stage)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_killed_processes_resume_to_the_bits_and_rows_of_undisturbed_ones(tmp_path: Path, strategy: str):
    undisturbed, stage = (learner(tmp_path / name, strategy=strategy) for name in ("undisturbed", "killed"))
    finish(undisturbed)
    process = start(stage)
    wait_for_checkpoint(stage, process, after=24)
    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        victim.kill()
    process.wait()
    require_the_bits_of(undisturbed, stage)


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_another_number_of_them_goes_on(tmp_path: Path):
    whole = learner(tmp_path / "whole", devices=1, dropout=0.0)
    assert run_stage(whole, Event()) is Outcome.FINISHED
    stage = learner(tmp_path / "cut", devices=2, dropout=0.0)
    process = start(stage)
    wait_for_checkpoint(stage, process, after=24)
    ranks = processes(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGUSR1)
    assert process.wait(timeout=180) == 75
    stopped_at = latest_checkpoint_samples(stage.work)
    assert stopped_at is not None
    assert 24 < stopped_at < 8 * STEPS
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert all(rank.status() == psutil.STATUS_ZOMBIE for rank in alive)
    # The same stage, on one process and in whole batches now: the same fingerprint, samples and noise.
    alone = learner(tmp_path / "cut", devices=1, dropout=0.0)
    assert run_stage(alone, Event()) is Outcome.FINISHED, log_of(alone)
    weights, expected = tiny.weights(alone), tiny.weights(whole)
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-6)
    assert [row["samples_seen"] for row in rows(alone)] == [row["samples_seen"] for row in rows(whole)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other_one_and_both_resume_to_the_bits_and_rows_of_undisturbed_ones(
    tmp_path: Path, rank: int
):
    undisturbed, stage = (learner(tmp_path / name) for name in ("undisturbed", "killed"))
    assert run_on_ranks([undisturbed]) == [0, 0], log_of(undisturbed)
    process = start(stage)
    wait_for_checkpoint(stage, process, after=24)
    ranks = processes(process)
    ranks[rank].kill()
    assert process.wait(timeout=60) not in (0, 75)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 2 or all(each.status() == psutil.STATUS_ZOMBIE for each in alive)
    if rank:
        failure = read_failure(stage.work)
        assert failure is not None
        assert "stage learner: process 1 of 2 was ended by SIGKILL" in failure.message
    require_the_bits_of(undisturbed, stage)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_process_that_no_longer_answers_ends_the_stage_after_the_time_out(tmp_path: Path, strategy: str):
    stage = learner(tmp_path, strategy=strategy, collective_timeout_s=40.0)  # to start in, too
    process = start(stage)
    wait_for_checkpoint(stage, process, after=0)
    ranks = processes(process)
    ranks[1].suspend()
    assert process.wait(timeout=240) == 1
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "stage learner: a process did not answer for trainer.collective_timeout_s=40" in failure.message
    ranks[1].kill()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_gradient_in_shards_that_is_not_finite_stops_both_and_names_their_samples(tmp_path: Path, strategy: str):
    stage = tiny.frozen(tmp_path, devices=2, strategy=StrategyName(strategy), learning_rate=1e38)
    run_stage(tiny.data_of(stage), Event())
    assert start(stage).wait(timeout=300) == 1
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "the gradient is not finite" in failure.message
    (record,) = (stage.work / "non_finite.jsonl").read_text().splitlines()
    assert len(json.loads(record)["keys"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clip_in_pieces_on_two_devices_learns_what_it_learns_on_one(tmp_path: Path, precision: str):
    """The contrastive loss over both devices' pairs, and the activations of two pairs at a time."""
    networks = []
    for name, trainer in (("one", []), ("two", ["trainer.devices=2", "stage.clip.trainer.micro_batch_size=2"])):
        settings = ["stage.clip.max_samples=48", f"stage.clip.trainer.precision={precision}", *trainer]
        stages = plan_stages(tmp_path / name, *settings)
        assert run_stage(stages["prepare"], Event()).value == "finished"
        if trainer:
            finish(stages["clip"])
        else:
            assert run_stage(stages["clip"], Event()) is Outcome.FINISHED
        artifact = stages["clip"].store.find("clip", stages["clip"].fingerprint)
        assert artifact is not None
        networks.append(load_file(artifact.path / "clip.safetensors"))
    one, two = networks
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_that_loaded_deepspeed_ends_with_its_stage_and_another_one_runs_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its engine stays in memory: on a GPU, beside the next stage's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sharded = tiny.frozen(tmp_path / "sharded", strategy=StrategyName.ZERO2)
    plain = tiny.frozen(tmp_path / "plain", strategy=StrategyName.DDP)
    for stage in (sharded, plain):
        run_stage(tiny.data_of(stage), Event())
    worker = Worker(os.environ)
    pids = []

    def run(stage: FrozenStage) -> Outcome:
        worker.begin(write_frozen(stage))
        while (outcome := worker.outcome()) is None:
            time.sleep(0.05)
        return outcome

    try:
        for stage in (tiny.data_of(sharded), sharded, plain, tiny.data_of(plain)):
            assert run(stage) in (Outcome.FINISHED, Outcome.REUSED), log_of(stage)
            assert worker._process is not None
            pids.append(worker._process.pid)
    finally:
        worker.close()
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert "training by zero2 on 1 devices" in log_of(sharded)
