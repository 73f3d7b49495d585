"""Checkpoints are written while training goes on, and each is whole, of its own step, or not there."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import StrategyName
from pipeline.training.stage import run_stage
from pipeline.training.strategies import host_memory
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.frozen import FrozenStage, write_frozen
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure, read_progress
from pipeline.workflow.record import without_measured
from tests.support import ROOT, tiny
from tests.support.held_checkpoints import GO_ON, SLOW_RANK, held, in_flight, with_held_checkpoints
from tests.support.ranks import log_of
from tests.support.tiny import SCRIPT, are_equal, frozen, rows, run, weights

Context = tiny.StageContext


def at(samples: int, happens: Callable[[Context], object]) -> Callable[[Context], None]:
    """Let that happen in the step that begins at so many samples."""

    def look(context: Context) -> None:
        if 8 * (len(SCRIPT.seen) - 1) == samples:
            happens(context)

    return look


def let_go_on(context: Context) -> None:
    (context.work / GO_ON).touch()


def crash(_context: Context) -> None:
    raise RuntimeError("the power went")


def require_nothing_left(stage: FrozenStage) -> None:
    assert in_flight(stage) == []
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


def require_the_same(stage: FrozenStage, undisturbed: FrozenStage) -> None:
    assert are_equal(weights(stage), weights(undisturbed))
    assert list(map(without_measured, rows(stage))) == list(map(without_measured, rows(undisturbed)))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path):
    stage = frozen(tmp_path, max_samples=160, checkpoint_every_samples=80)
    seen: list[tuple[list[int], int | None]] = []

    def look_and_let_go_on(context: Context) -> None:
        seen.append((in_flight(stage), latest_checkpoint_samples(context.work)))
        let_go_on(context)

    SCRIPT.every_step = at(128, look_and_let_go_on)
    with held(from_samples=80):
        assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert seen == [([80], None)]
    names = [path.name for path in sorted((stage.work / "checkpoints").glob("*.json"))]
    assert names == ["samples-000000000080.json", "samples-000000000160.json"]
    require_nothing_left(stage)


def test_what_is_written_later_is_the_state_of_its_own_step(tmp_path: Path):
    """A crash long after the step: the checkpoint resumes to the bits and rows of an undisturbed training."""
    whole, stage = (frozen(tmp_path / name, dropout=0.3, checkpoint_every_samples=32) for name in ("whole", "cut"))
    assert run(whole) is Outcome.FINISHED

    def crash_and_let_go_on(context: Context) -> None:
        let_go_on(context)
        crash(context)

    SCRIPT.seen.clear()
    SCRIPT.every_step = at(56, crash_and_let_go_on)
    with held(from_samples=32):
        assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.message == "RuntimeError: the power went"
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert kept.samples_seen == 32
    require_nothing_left(stage)
    SCRIPT.every_step = lambda _context: None
    assert run(stage) is Outcome.FINISHED
    require_the_same(stage, whole)


def test_the_next_checkpoint_waits_for_the_one_before_it(tmp_path: Path):
    stage = frozen(tmp_path, keep_checkpoints=9)
    timers: list[threading.Timer] = []

    def let_go_on_soon(context: Context) -> None:
        timers.append(threading.Timer(0.3, let_go_on, (context,)))
        timers[0].start()

    SCRIPT.every_step = at(24, let_go_on_soon)
    with held(from_samples=16):
        assert run(stage) is Outcome.FINISHED
    names = [path.stem for path in sorted((stage.work / "checkpoints").glob("*.json"))]
    assert names == [f"samples-{samples:012}" for samples in range(16, 81, 16)]
    require_nothing_left(stage)


def test_a_stop_while_a_checkpoint_is_written_ends_with_a_whole_one_at_the_step_of_the_stop(tmp_path: Path):
    whole, stage = (frozen(tmp_path / name, checkpoint_every_samples=32) for name in ("whole", "cut"))
    assert run(whole) is Outcome.FINISHED

    def stop_and_let_go_on_soon(context: Context) -> None:
        context.interruption.set()
        threading.Timer(0.3, let_go_on, (context,)).start()

    SCRIPT.seen.clear()
    SCRIPT.every_step = at(40, stop_and_let_go_on_soon)
    with held(from_samples=32):
        assert run(stage) is Outcome.INTERRUPTED
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert kept.samples_seen == 48
    assert len(list((stage.work / "checkpoints").glob("*.json"))) == 2, "the one that was in flight is kept too"
    require_nothing_left(stage)
    SCRIPT.every_step = lambda _context: None
    assert run(stage) is Outcome.FINISHED
    require_the_same(stage, whole)


def test_a_lost_stage_leaves_what_was_in_flight(tmp_path: Path):
    def lose(context: Context) -> None:
        claim = context.work / "attempts" / "000001.json"
        claim.with_stem("000002").write_text(claim.read_text().replace('"attempt": 1', '"attempt": 2'))
        with pytest.raises(Exception, match="another process has the stage now"):
            context.ownership.require()

    stage = frozen(tmp_path, checkpoint_every_samples=32)
    SCRIPT.every_step = at(40, lose)
    with held(from_samples=32):
        assert run(stage) is Outcome.INTERRUPTED
    assert latest_checkpoint(stage.work) is None
    require_nothing_left(stage)


def test_without_memory_for_a_copy_training_waits_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, stage = (frozen(tmp_path / name) for name in ("whole", "poor"))
    assert run(whole) is Outcome.FINISHED
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    assert run(stage) is Outcome.FINISHED
    require_the_same(stage, whole)
    one, other = (latest_checkpoint(each.work) for each in (whole, stage))
    assert one is not None
    assert other is not None
    fragments = [name for name in one.files if name.startswith("fragments")]
    assert [one.files[name] for name in fragments] == [other.files[name] for name in fragments]


def start(stage: FrozenStage, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def wait_until(stage: FrozenStage, process: subprocess.Popen[bytes], is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None, log_of(stage)
        assert time.monotonic() < limit, log_of(stage)
        time.sleep(0.02)


def is_past(stage: FrozenStage, samples: int) -> Callable[[], bool]:
    return lambda: any(row["samples_seen"] >= samples for row in rows(stage))


def learner(outputs: Path, devices: int, strategy: StrategyName) -> FrozenStage:
    stage = frozen(
        outputs, dropout=0.3, devices=devices, strategy=strategy, checkpoint_every_samples=32, keep_checkpoints=9
    )
    run_stage(tiny.data_of(stage), threading.Event())
    return stage


def start_held(stage: FrozenStage, *, from_samples: int, slow_rank: int, until_past: int) -> subprocess.Popen[bytes]:
    """A training that went on while one of its processes still has that checkpoint to write."""
    process = start(with_held_checkpoints(stage, from_samples), **{SLOW_RANK: str(slow_rank)})
    wait_until(stage, process, is_past(stage, until_past))
    assert in_flight(stage) == [from_samples]
    return process


RANKS = [(1, StrategyName.DDP), (2, StrategyName.DDP), (2, StrategyName.ZERO2), (2, StrategyName.ZERO3)]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "strategy"), RANKS)
def test_a_kill_while_one_process_still_writes_resumes_from_the_checkpoint_before(
    tmp_path: Path, devices: int, strategy: StrategyName
):
    whole, stage = (learner(tmp_path / name, devices, strategy) for name in ("whole", "cut"))
    assert start(whole).wait(timeout=300) == 0, log_of(whole)
    # The step after the next one would begin another checkpoint or end training, and so wait.
    process = start_held(stage, from_samples=64, slow_rank=devices - 1, until_past=72)
    process.kill()
    process.wait()
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert (kept.samples_seen, kept.writers) == (32, devices)
    assert start(stage).wait(timeout=300) == 0, log_of(stage)
    require_the_same(stage, whole)
    require_nothing_left(stage)


@pytest.mark.slow
def test_two_processes_make_a_checkpoint_when_the_slower_one_has_written_its_part(tmp_path: Path):
    stage = learner(tmp_path, 2, StrategyName.DDP)
    process = start_held(stage, from_samples=32, slow_rank=1, until_past=56)
    assert latest_checkpoint_samples(stage.work) is None
    (stage.work / GO_ON).touch()
    assert process.wait(timeout=300) == 0, log_of(stage)
    names = [path.stem for path in sorted((stage.work / "checkpoints").glob("*.json"))]
    assert names == [f"samples-{samples:012}" for samples in (32, 64, 80)]
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert kept.writers == 2
    require_nothing_left(stage)


@pytest.mark.slow
def test_a_signal_while_one_process_still_writes_ends_both_with_a_checkpoint_at_their_step(tmp_path: Path):
    stage = learner(tmp_path, 2, StrategyName.DDP)
    process = start_held(stage, from_samples=32, slow_rank=1, until_past=56)
    process.send_signal(signal.SIGUSR1)
    (stage.work / GO_ON).touch()
    assert process.wait(timeout=300) == 75, log_of(stage)
    kept, progress = latest_checkpoint(stage.work), read_progress(stage.work)
    assert kept is not None
    assert progress is not None
    assert kept.samples_seen == progress.samples_seen
    assert in_flight(stage) == []
