import shutil
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.config import Precision, StrategyName
from pipeline.data.batch import ImageBatch
from pipeline.training import context
from pipeline.training.optimizer import learning_rate_factor
from pipeline.training.stage import THREADS_AT_START, run_stage
from pipeline.workflow.batch_shape import BatchShape, shape_of_batch
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.progress import Outcome, Phase, read_failure, read_progress
from pipeline.workflow.sealed import read_json, write_json_atomically
from tests.support import tiny
from tests.support.tiny import SCRIPT, are_equal, finished, frozen, rows, run, weights
from tests.support.tiny_runs import rows_of


def crash(_context: object) -> None:
    raise RuntimeError("the power went")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Final weights of a run of 10 steps with dropout that nothing disturbed."""
    stage = frozen(tmp_path_factory.mktemp("undisturbed"), dropout=0.3)
    assert run(stage) is Outcome.FINISHED
    return weights(stage)


def test_training_publishes_weights_metrics_and_the_counter(tmp_path: Path):
    stage = frozen(tmp_path)
    assert run(stage) is Outcome.FINISHED
    artifact = finished(stage)
    artifact.opened()
    assert artifact.manifest.samples_seen == 80
    assert artifact.manifest.metrics["loss"] > 0
    assert (artifact.path / "samples.png").exists()
    assert rows_of(artifact) == rows(stage)


def test_a_stage_that_sets_no_threads_has_those_of_its_process_whatever_ran_there_before(tmp_path: Path):
    more = THREADS_AT_START + 1
    for name, cpu_threads, expected in (("first", more, more), ("second", None, THREADS_AT_START)):
        assert run(frozen(tmp_path / name, cpu_threads=cpu_threads)) is Outcome.FINISHED
        # The data's stage of the test runs first, on one.
        assert torch.get_num_threads() == expected


def test_on_the_cpu_nothing_is_pinned_whatever_gpus_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, torch.Tensor]
):
    pinned = list[bool]()
    make = DataLoader.__init__

    def noted(loader: DataLoader[ImageBatch], *given: Any, **options: Any) -> None:
        pinned.append(options["pin_memory"])
        make(loader, *given, **options)

    monkeypatch.setattr(DataLoader, "__init__", noted)
    stage = frozen(tmp_path, dropout=0.3)
    assert run(stage) is Outcome.FINISHED
    assert pinned == [False, False]  # training's and the validation's
    assert are_equal(weights(stage), undisturbed)


def test_training_in_bf16_ends_with_the_loss_of_float32(tmp_path: Path):
    ends = []
    for precision in (Precision.FLOAT32, Precision.BFLOAT16_MIXED, Precision.BFLOAT16_PRODUCTS):
        stage = frozen(tmp_path / precision.value, max_samples=1600, precision=precision)
        assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
        losses = [row["train/loss"] for row in rows(stage) if "train/loss" in row]
        ends.append(sum(losses[-10:]))
        assert ends[-1] < 0.5 * sum(losses[:10])
        assert all(weight.dtype is torch.float32 for weight in weights(stage).values())
    assert ends[1:] == pytest.approx([ends[0]] * 2, rel=0.05)


def test_every_row_has_the_counter_and_the_learning_rate_of_its_formula(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    logged = rows(stage)
    assert all("samples_seen" in row for row in logged)
    rates = {row["samples_seen"]: row["learning_rate"] for row in logged if "learning_rate" in row}
    assert list(rates) == list(range(8, 81, 8))
    for samples, rate in rates.items():
        assert rate == pytest.approx(1e-2 * learning_rate_factor(tiny.OPTIMIZER, int(samples), 80))
    assert [row["samples_seen"] for row in logged if "validation/loss" in row] == [80]


def test_a_finished_stage_is_reused_without_training(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    SCRIPT.seen.clear()
    assert run(stage) is Outcome.REUSED
    assert SCRIPT.seen == []


def test_progress_is_published(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    progress = read_progress(stage.work)
    assert progress is not None
    assert (progress.samples_seen, progress.max_samples) == (80, 80)
    assert progress.loss is not None
    assert progress.updated_at >= progress.started_at > 0


@pytest.mark.parametrize("at_samples", [8, 40, 64])
def test_a_stopped_run_resumes_to_the_bits_of_an_undisturbed_one(
    tmp_path: Path, at_samples: int, undisturbed: dict[str, torch.Tensor]
):
    stage = frozen(tmp_path, dropout=0.3)
    SCRIPT.at_samples, SCRIPT.happens = at_samples, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    stopped = latest_checkpoint(stage.work)
    assert stopped is not None
    assert stopped.samples_seen == at_samples + 8
    progress = read_progress(stage.work)
    assert progress is not None
    assert progress.phase is Phase.INTERRUPTED
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    assert are_equal(weights(stage), undisturbed)


@pytest.mark.parametrize("change", [{"loader_workers": 1}, {"cache_mib": 0}, {"log_every_steps": 3}], ids=str)
def test_how_a_stage_runs_does_not_change_a_bit_of_it(
    tmp_path: Path, change: dict[str, Any], undisturbed: dict[str, torch.Tensor]
):
    stage = frozen(tmp_path, dropout=0.3, **change)
    assert run(stage) is Outcome.FINISHED
    assert are_equal(weights(stage), undisturbed)


def test_validating_and_drawing_in_between_does_not_change_a_bit(tmp_path: Path, undisturbed: dict[str, torch.Tensor]):
    stage = frozen(tmp_path, dropout=0.3, validate_every_samples=16, sample_every_samples=16)
    run(stage)
    assert SCRIPT.validations == 5
    assert len(list((stage.work / "samples").glob("*.png"))) == 5
    assert are_equal(weights(stage), undisturbed)


def test_a_crashed_run_resumes_from_its_last_checkpoint_to_the_same_bits_and_rows(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
):
    stage = frozen(tmp_path, dropout=0.3)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert (failure.message, failure.is_user_error) == ("RuntimeError: the power went", False)
    assert [row["samples_seen"] for row in rows(stage)][-1] == 56
    before = len(SCRIPT.seen)
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    assert are_equal(weights(stage), undisturbed)
    # The checkpoint is at 48: one step is repeated, with the same samples.
    assert len(SCRIPT.seen) - before == 4
    assert SCRIPT.seen[before] == SCRIPT.seen[6]
    assert read_failure(stage.work) is None


def test_rows_have_no_duplicates_after_a_resume(tmp_path: Path):
    stage, whole = frozen(tmp_path / "a"), frozen(tmp_path / "b")
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    run(stage)
    with (stage.work / "metrics.jsonl").open("a") as file:
        file.write('{"samples_seen": 64, "train/lo')
    SCRIPT.at_samples = None
    run(stage)
    run(whole)
    keys = [(row["samples_seen"], "validation/loss" in row) for row in rows(stage)]
    assert len(keys) == len(set(keys))
    assert keys == [(row["samples_seen"], "validation/loss" in row) for row in rows(whole)]
    assert [row.get("train/loss") for row in rows(stage)] == [row.get("train/loss") for row in rows(whole)]


def test_a_torn_checkpoint_costs_only_the_steps_since_the_one_before_it(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
):
    stage = frozen(tmp_path, dropout=0.3)
    SCRIPT.at_samples, SCRIPT.happens = 56, crash
    run(stage)
    newest = stage.work / "checkpoints" / "samples-000000000048.ckpt" / "fragments-00000-of-00001.000.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    before = len(SCRIPT.seen)
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    assert len(SCRIPT.seen) - before == 6
    assert are_equal(weights(stage), undisturbed)


def test_the_last_checkpoints_are_kept_and_nothing_is_left_beside(tmp_path: Path):
    stage = frozen(tmp_path, keep_checkpoints=3)
    run(stage)
    names = sorted(path.name for path in (stage.work / "checkpoints").iterdir())
    kept = ["samples-000000000048", "samples-000000000064", "samples-000000000080"]
    assert names == [f"{name}.{suffix}" for name in kept for suffix in ("ckpt", "json")]


@pytest.mark.parametrize(("first", "second"), [(None, 2), (3, None)])
def test_another_micro_batch_after_a_resume_changes_the_result_by_rounding_only(
    tmp_path: Path, first: int | None, second: int | None
):
    whole = frozen(tmp_path / "whole")
    run(whole)
    SCRIPT.at_samples, SCRIPT.happens = 32, lambda context: context.interruption.set()
    assert run(frozen(tmp_path / "cut", micro_batch_size=first)) is Outcome.INTERRUPTED
    SCRIPT.at_samples = None
    resumed = frozen(tmp_path / "cut", micro_batch_size=second)
    SCRIPT.seen.clear()
    assert run(resumed) is Outcome.FINISHED
    assert len(SCRIPT.seen) == (20 if second == 2 else 5)
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], expected, rtol=1e-4, atol=1e-6)
    assert [row["samples_seen"] for row in rows(resumed)] == [row["samples_seen"] for row in rows(whole)]


def test_a_run_killed_between_its_last_checkpoint_and_publishing_publishes_without_training(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    stage = frozen(tmp_path, dropout=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(context, "save_file", lambda *_: crash(None))
        assert run(stage) is Outcome.FAILED
    SCRIPT.seen.clear()
    assert run(stage) is Outcome.FINISHED
    assert SCRIPT.seen == []
    assert are_equal(weights(stage), undisturbed)
    assert finished(stage).manifest.metrics["loss"] > 0


def test_a_missing_input_is_the_user_s_to_mend(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    data = tmp_path / "artifacts" / "data" / tiny.DATA
    other = stage.model_copy(update={"fingerprint": "2" * 64})
    for take_away, line in (
        ((data / "manifest.json").unlink, f"{data / 'manifest.json'} is gone; run it again with store"),
        (partial(shutil.rmtree, data), "stage learner needs the artifact data/"),
    ):
        take_away()
        assert run_stage(other, Event()) is Outcome.FAILED
        failure = read_failure(other.work)
        assert failure is not None
        assert failure.is_user_error
        assert line in failure.message


def test_the_order_of_samples_is_independent_of_micro_batches_and_workers(tmp_path: Path):
    orders = []
    for name, micro_batch_size in (("a", None), ("b", 2), ("c", 4)):
        SCRIPT.seen.clear()
        run(frozen(tmp_path / name, micro_batch_size=micro_batch_size))
        orders.append([sample for batch in SCRIPT.seen for sample in batch])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    ("batch", "devices", "limit", "shape"),
    [
        (64, 1, None, BatchShape(64, 1)),
        (64, 2, None, BatchShape(32, 1)),
        (64, 1, 16, BatchShape(16, 4)),
        (64, 4, 100, BatchShape(16, 1)),
        (12, 1, 5, BatchShape(4, 3)),
        (7, 1, 6, BatchShape(1, 7)),
    ],
)
def test_a_batch_is_cut_into_equal_micro_batches_of_at_most_the_allowed_size(
    batch: int, devices: int, limit: int | None, shape: BatchShape
):
    settings = tiny.TRAINER.model_copy(update={"devices": devices, "micro_batch_size": limit})
    assert shape_of_batch(batch, settings) == shape


def test_inside_averaged_the_network_holds_the_averages_and_afterwards_training_goes_on_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = []

    def look(module: tiny.LearnerModule, _batches: object) -> dict[str, float]:
        inside = [each.clone() for each in module.network.parameters()]
        averages = [tensor.clone() for _, tensor in module.strategy.averaged_parameters()]
        seen.append((inside, averages, [each.clone() for each in trained[0].parameters()]))
        return {}

    def remember(module: tiny.LearnerModule) -> None:
        trained.append(module.network)

    trained: list[torch.nn.Module] = []
    monkeypatch.setattr(tiny.LearnerModule, "validation_metrics", look)
    monkeypatch.setattr(tiny.LearnerModule, "on_train_start", remember)
    stage = frozen(tmp_path, validate_every_samples=40)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert len(seen) == 2
    for inside, averages, weights_of_training in seen:
        assert all(map(torch.equal, inside, averages))
        assert not any(map(torch.equal, inside, weights_of_training))
    assert all(map(torch.equal, weights(stage).values(), seen[-1][1]))


def test_the_checkpoint_of_another_model_is_refused_in_one_line(tmp_path: Path):
    stage = frozen(tmp_path)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    checkpoint = latest_checkpoint(stage.work)
    assert checkpoint is not None
    description = checkpoint.path / "description.json"
    description.write_text(description.read_text().replace("[16, 192]", "[16, 48]"))
    record = checkpoint.path.with_suffix(".json")
    digest = file_sha256(description)
    values = read_json(record)
    write_json_atomically(record, {**values, "files": {**values["files"], "description.json": digest}})
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "is a checkpoint of another model: 1.weight has shape [16, 48] there and [16, 192] here" in failure.message


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accelerator": "gpu", "devices": 99}, "trainer.accelerator=gpu and this machine has no CUDA GPU"),
        ({"devices": 99}, "trainer.devices=99 and this machine has"),
        (
            {"strategy": StrategyName.ZERO2, "precision": Precision.FLOAT16_MIXED},
            "trainer.precision=16-mixed works with trainer=ddp alone; for zero2 use bf16-mixed",
        ),
    ],
    ids=str,
)
def test_what_the_machine_or_the_strategy_cannot_do_is_refused_in_one_line_before_training(
    tmp_path: Path, trainer: dict[str, Any], message: str
):
    if trainer.get("accelerator") == "gpu" and torch.cuda.is_available():
        trainer, message = {"accelerator": "gpu", "devices": 99}, "trainer.devices=99 and this machine has"
    stage = frozen(tmp_path, **trainer)
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert message in failure.message
    assert SCRIPT.seen == []
