"""What happens to a stage when hardware, data or numbers fail it."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pipeline.config import NonFinite
from pipeline.data.dataset import CaptionedImages
from pipeline.data.splits import Split
from pipeline.errors import UserError
from pipeline.training.non_finite import MAX_SKIPPED_IN_A_ROW, RECORD, NonFiniteGuard
from pipeline.training.optimizer import build_optimizer
from pipeline.training.strategies.portable import PlainStrategy
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.ownership import StageLost
from pipeline.workflow.progress import Failure, Outcome, Phase, latest_checkpoint_samples, read_failure, read_progress
from pipeline.workflow.sealed import read_json
from tests.support import tiny
from tests.support.tiny import SCRIPT, are_equal, finished, frozen, rows, run, weights


def failure_of(stage: FrozenStage) -> Failure:
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    return failure


def break_loss(_context: object) -> None:
    SCRIPT.loss_factor = float("nan")


def test_a_gradient_that_is_not_finite_stops_the_stage_and_names_the_samples_and_the_remedies(tmp_path: Path):
    SCRIPT.at_samples, SCRIPT.happens = 16, break_loss
    stage = frozen(tmp_path)
    failure = failure_of(stage)
    assert failure.is_user_error
    assert "the gradient is not finite after 16 samples" in failure.message
    assert (
        "lower stage.learner.optimizer.learning_rate, or set stage.learner.optimizer.non_finite=skip" in failure.message
    )
    (record,) = (json.loads(line) for line in (stage.work / RECORD).read_text().splitlines())
    assert record["samples_seen"] == 16
    assert record["keys"] == [f"{row:05d}" for row in SCRIPT.seen[2]]
    assert f"samples {', '.join(record['keys'][:4])} and 4 more" in failure.message


def test_a_skipped_step_leaves_weights_moments_and_average_alone_and_training_goes_on(tmp_path: Path):
    def break_one_step(_context: object) -> None:
        SCRIPT.loss_factor = float("nan") if len(SCRIPT.seen) == 3 else 1.0

    stage = frozen(tmp_path, non_finite=NonFinite.SKIP)
    SCRIPT.every_step = break_one_step
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert all(bool(weight.isfinite().all()) for weight in weights(stage).values())
    of_steps = [row for row in rows(stage) if "train/loss" in row or "train/steps_skipped" in row]
    assert [row["samples_seen"] for row in of_steps] == list(range(8, 81, 8))
    assert "train/loss" not in of_steps[2]
    assert [row.get("train/steps_skipped", 0) for row in of_steps] == [0, 0] + [1] * 8
    assert len((stage.work / RECORD).read_text().splitlines()) == 1


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_broken_step_is_said_with_its_own_samples_though_it_is_looked_at_later(tmp_path: Path, asked_to_stop: bool):
    def break_the_third_step(context: tiny.StageContext) -> None:
        SCRIPT.loss_factor = float("nan") if len(SCRIPT.seen) == 3 else 1.0
        if asked_to_stop and len(SCRIPT.seen) == 5:
            context.interruption.set()

    SCRIPT.every_step = break_the_third_step
    stage = frozen(tmp_path, log_every_steps=10, checkpoint_every_samples=None)
    assert "the gradient is not finite after 16 samples" in failure_of(stage).message
    (record,) = (json.loads(line) for line in (stage.work / RECORD).read_text().splitlines())
    assert record == {"samples_seen": 16, "gradient_norm": "nan", "keys": [f"{row:05d}" for row in SCRIPT.seen[2]]}
    assert len(SCRIPT.seen) == (5 if asked_to_stop else 10)
    assert latest_checkpoint(stage.work) is None


def test_skipping_everything_is_not_training(tmp_path: Path):
    SCRIPT.loss_factor = float("nan")
    failure = failure_of(frozen(tmp_path, non_finite=NonFinite.SKIP, max_samples=8 * 100))
    assert f"these were {MAX_SKIPPED_IN_A_ROW + 1} such steps in a row" in failure.message


def test_too_many_unusable_samples_stop_the_stage_and_name_reasons_and_shards(tmp_path: Path):
    SCRIPT.broken_samples = 4
    failure = failure_of(frozen(tmp_path, max_samples=800))
    assert failure.is_user_error
    assert "not_an_image" in failure.message
    assert "most in 00000.tar (" in failure.message
    assert "allow more than trainer.max_faulty_share=0.05" in failure.message


def test_few_unusable_samples_are_counted_in_the_rows_over_a_resume_too(tmp_path: Path):
    SCRIPT.broken_samples = 4
    whole = frozen(tmp_path / "whole", max_faulty_share=0.5)
    assert run(whole) is Outcome.FINISHED
    stage = frozen(tmp_path / "cut", max_faulty_share=0.5)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    counts = [row["data/faulty_not_an_image"] for row in rows(stage) if "data/faulty" in row]
    assert counts == [row["data/faulty_not_an_image"] for row in rows(whole) if "data/faulty" in row]
    assert counts[-1] > 4
    assert are_equal(weights(stage), weights(whole))


@pytest.mark.parametrize("log_every_steps", [3, 4])
def test_what_was_added_up_since_the_last_row_is_in_the_checkpoint(tmp_path: Path, log_every_steps: int):
    whole = frozen(tmp_path / "whole", log_every_steps=log_every_steps)
    run(whole)
    stage = frozen(tmp_path / "cut", log_every_steps=log_every_steps)
    SCRIPT.at_samples, SCRIPT.happens = 32, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    names = ("samples_seen", "train/loss", "train/gradient_norm", "learning_rate")
    assert [[row.get(name) for name in names] for row in rows(stage)] == [
        [row.get(name) for name in names] for row in rows(whole)
    ]


@contextmanager
def file_sizes_restored() -> Iterator[None]:
    """Let a test have the operating system refuse bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def once_checkpointed(
    samples: int, happens: Callable[[tiny.StageContext], None]
) -> Callable[[tiny.StageContext], None]:
    """What happens in the first step that finds the checkpoint at `samples` made."""
    done = threading.Event()

    def look(context: tiny.StageContext) -> None:
        if not done.is_set() and latest_checkpoint_samples(context.work) == samples:
            done.set()
            happens(context)

    return look


def refuse_files_past_8000_bytes(_context: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_good_checkpoint_and_a_message(tmp_path: Path):
    whole = frozen(tmp_path / "whole")
    run(whole)
    stage = frozen(tmp_path / "full", checkpoint_every_samples=32)
    SCRIPT.every_step = once_checkpointed(32, refuse_files_past_8000_bytes)
    with file_sizes_restored():
        assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "no space is left" in failure.message
    assert "the checkpoint at 32 samples is intact: free some, and run again" in failure.message
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert kept.samples_seen == 32
    assert not list((stage.work / "checkpoints").glob("*.tmp*"))
    SCRIPT.every_step = lambda _context: None
    assert run(stage) is Outcome.FINISHED
    assert are_equal(weights(stage), weights(whole))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow  # it mounts a file system, which not every machine allows
def test_a_disk_with_no_room_for_one_more_checkpoint_keeps_one_while_the_next_is_written(
    tmp_path: Path, small_disk: Path
):
    whole = frozen(tmp_path / "whole")
    run(whole)
    stage = frozen(small_disk)
    kept: list[int] = []

    def leave_room_for_less_than_a_checkpoint(context: tiny.StageContext) -> None:
        size = sum(file.stat().st_size for file in next((context.work / "checkpoints").glob("*.ckpt")).iterdir())
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 3 * size // 4))

    fill = once_checkpointed(32, leave_room_for_less_than_a_checkpoint)

    def look(context: tiny.StageContext) -> None:
        fill(context)
        kept.append(len(list((context.work / "checkpoints").glob("*.json"))))
        # What a checkpoint was resumed from can be deleted: no process holds it.
        assert ".ckpt" not in Path("/proc/self/maps").read_text()

    SCRIPT.every_step = look
    SCRIPT.at_samples, SCRIPT.happens = 64, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED, read_failure(stage.work)
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert 0 not in kept[kept.index(1) :]
    assert are_equal(weights(stage), weights(whole))


def test_a_finished_stage_drops_its_checkpoints_where_that_is_set(tmp_path: Path):
    stage = frozen(tmp_path, drop_checkpoints=True)
    assert run(stage) is Outcome.FINISHED
    assert not (stage.work / "checkpoints").exists()


def test_a_disk_that_takes_nothing_at_all_ends_the_stage_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refuse_everything(_context: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    stage = frozen(tmp_path)
    SCRIPT.at_samples, SCRIPT.happens = 40, refuse_everything
    with file_sizes_restored():
        assert run(stage) is Outcome.FAILED
    assert "no space is left" in capsys.readouterr().out
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED


def test_an_overflow_under_a_gradient_scaler_is_routine_and_a_broken_loss_is_not(tmp_path: Path):
    """Precision 16-mixed needs a GPU: here the guard alone, with a trainer that has a scaler."""
    stage = frozen(tmp_path)
    run(stage)
    module = tiny.learner_module()
    strategy = PlainStrategy(torch.device("cpu"), title="ddp")
    strategy.connect(module)
    context = SimpleNamespace(frozen=stage, work=stage.work, is_first_process=True, is_lost=False)
    images = CaptionedImages(tmp_path / "artifacts" / "data" / tiny.DATA, tiny.SIZE)
    guard = NonFiniteGuard(cast(Any, context), stage.trainer, images, NonFinite.STOP)
    plugin = SimpleNamespace(scaler=object())
    trainer: Any = SimpleNamespace(precision_plugin=plugin, world_size=1, strategy=strategy, global_step=0)
    module._trainer = trainer
    optimizer = build_optimizer(module.network, tiny.OPTIMIZER, {}, fused=True)
    strategy.optimizers = [optimizer]
    for parameter in module.network.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    for _ in range(MAX_SKIPPED_IN_A_ROW):
        module.step_losses = [torch.tensor(1.0)]
        guard.on_before_optimizer_step(trainer, module, optimizer)
    guard.look(trainer)
    module.step_losses = [torch.tensor(1.0)]
    guard.on_before_optimizer_step(trainer, module, optimizer)
    with pytest.raises(UserError, match="the gradient is not finite"):
        guard.look(trainer)
    fresh = NonFiniteGuard(cast(Any, context), stage.trainer, images, NonFinite.STOP)
    module.step_losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    fresh.on_before_optimizer_step(trainer, module, optimizer)
    with pytest.raises(UserError, match="the gradient is not finite"):
        fresh.look(trainer)


def test_running_out_of_memory_says_what_to_turn_down(tmp_path: Path):
    def ask_for_too_much(_context: object) -> None:
        torch.empty(2**55, dtype=torch.uint8)

    SCRIPT.at_samples, SCRIPT.happens = 16, ask_for_too_much
    failure = failure_of(frozen(tmp_path))
    assert failure.is_user_error
    assert "stage learner: out of memory" in failure.message
    assert "lower stage.learner.trainer.micro_batch_size" in failure.message


def test_an_error_of_the_operating_system_that_is_not_about_space_is_no_full_disk(tmp_path: Path):
    def fail(_context: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    SCRIPT.at_samples, SCRIPT.happens = 16, fail
    failure = failure_of(frozen(tmp_path))
    assert not failure.is_user_error
    assert "Input/output error" in failure.message


def noticed_at_the_checkpoint(_context: tiny.StageContext) -> None:
    """A checkpoint asks the file system before it writes."""


def noticed_before_it(context: tiny.StageContext) -> None:
    with pytest.raises(StageLost):
        context.ownership.require()
    assert context.is_lost


@pytest.mark.parametrize("notice", [noticed_at_the_checkpoint, noticed_before_it], ids=lambda each: each.__name__)
def test_a_stage_that_is_lost_in_mid_step_says_so_writes_nothing_more_and_is_finished_by_its_successor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], notice: Callable[[tiny.StageContext], None]
):
    def lose(context: tiny.StageContext) -> None:
        attempts = context.work / "attempts"
        other = read_json(attempts / "000001.json") | {"attempt": 2, "pid": 2**30}
        (attempts / "000002.json").write_text(json.dumps(other))
        notice(context)

    stage = frozen(tmp_path, checkpoint_every_samples=32)
    SCRIPT.every_step = once_checkpointed(32, lose)
    assert run(stage) is Outcome.INTERRUPTED
    assert "stopped, as another process has the stage now" in capsys.readouterr().out
    assert stage.store.find("learner", stage.fingerprint) is None
    kept = latest_checkpoint(stage.work)
    assert kept is not None
    assert kept.samples_seen == 32
    progress = read_progress(stage.work)
    assert progress is not None
    assert progress.phase is not Phase.INTERRUPTED
    SCRIPT.every_step = lambda _context: None
    assert run(stage) is Outcome.FINISHED
    assert finished(stage).manifest.samples_seen == 80


def test_data_without_held_out_samples_ends_a_training_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "split_of", lambda _key, _fraction: Split.TRAIN)
    failure = failure_of(frozen(tmp_path))
    assert failure.is_user_error
    assert "the split validation has no samples" in failure.message
    assert "raise data.validation_fraction" in failure.message
    assert SCRIPT.seen == []
