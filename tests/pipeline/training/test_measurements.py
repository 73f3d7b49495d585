import json
import time
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psutil
import pytest
import torch
from pytorch_lightning import Trainer

from pipeline.config import Precision
from pipeline.data.batch import ImageBatch
from pipeline.data.dataset import CaptionedImages, SampleRequest
from pipeline.training import measurements
from pipeline.training.measurements import peak_flops
from pipeline.training.rows import Rows
from pipeline.workflow.progress import Outcome, read_hardware
from pipeline.workflow.record import without_measured
from tests.support import tiny
from tests.support.tiny import SCRIPT, finished, frozen, rows, run


def test_every_row_has_what_was_measured_under_one_prefix(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    logged = rows(stage)
    measured = {"system/elapsed_s", "system/samples_per_s", "system/data_wait_share", "system/memory_mib"}
    training, validation = logged[:-1], logged[-1]
    assert all({name for name in row if name.startswith("system/")} == measured for row in training)
    assert "system/elapsed_s" in validation
    assert all(row["system/samples_per_s"] > 0 and 0 <= row["system/data_wait_share"] <= 1 for row in training)
    total_mib = psutil.virtual_memory().total / 2**20
    assert all(50 < row["system/memory_mib"] < total_mib for row in training)
    assert without_measured(validation).keys() == {"samples_seen", "validation/loss"}


def test_the_time_of_training_goes_on_after_a_resume(tmp_path: Path):
    stage = frozen(tmp_path, step_s=0.05)
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    time.sleep(0.5)  # which is no training
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    elapsed = [row["system/elapsed_s"] for row in rows(stage)]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] >= 10 * 0.05
    checkpoint = json.loads((stage.work / "checkpoints" / f"samples-{80:012}.json").read_text())
    assert checkpoint["elapsed_s"] >= elapsed[-1] - 0.001


def test_waiting_for_the_loader_is_told_from_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trains, waits = frozen(tmp_path / "trains", step_s=0.05), frozen(tmp_path / "waits")
    run(trains)
    fetch = CaptionedImages.__getitems__

    def fetch_slowly(images: CaptionedImages, requests: list[SampleRequest]) -> ImageBatch:
        time.sleep(0.05)
        return fetch(images, requests)

    monkeypatch.setattr(CaptionedImages, "__getitems__", fetch_slowly)
    run(waits)
    shares = [median(row["system/data_wait_share"] for row in rows(stage)[:-1]) for stage in (trains, waits)]
    assert shares[0] < shares[1]


def test_a_row_that_takes_longer_to_write_than_a_step_shows_no_other_rate_than_that_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take, seconds = Rows._take_means, cycle([0.0, 0.5])

    def take_long(own: Rows, trainer: Trainer) -> dict[str, float]:
        time.sleep(next(seconds))
        return take(own, trainer)

    monkeypatch.setattr(Rows, "_take_means", take_long)
    stage = frozen(tmp_path, step_s=0.02)
    run(stage)
    rates = [row["system/samples_per_s"] for row in rows(stage)[:-1]]
    assert max(rates) <= 8 / 0.02
    assert median(rates) > 8 / 0.5


def test_the_use_of_a_gpu_follows_from_counted_operations_rate_and_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = frozen(tmp_path / "whole")
    run(whole)
    # The peak of a device that this machine lacks.
    monkeypatch.setattr(measurements, "device_peak_flops", lambda _device, _precision: 1e9)
    stage = frozen(tmp_path / "counted", micro_batch_size=2)
    run(stage)
    forward = 2 * (3 * tiny.SIZE**2 * 16 + 16 * 3)
    backward = forward + 2 * 16 * 3  # for the weights, and for what the second layer was given
    for row in rows(stage)[:-1]:
        expected = (forward + backward) * row["system/samples_per_s"] / 1e9
        assert row["system/mfu"] == pytest.approx(expected, abs=1e-6)
    assert all("system/mfu" not in row for row in rows(whole))


def test_what_is_done_between_batches_is_no_time_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ahead_s = 0.0
    validate = tiny.LearnerModule.validation_metrics

    def validate_for_hours(module: tiny.LearnerModule, batches: Iterable[ImageBatch]) -> dict[str, float]:
        nonlocal ahead_s
        ahead_s += 10_000.0
        return validate(module, batches)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s)
    monkeypatch.setattr(measurements, "time", clock)
    monkeypatch.setattr(tiny.LearnerModule, "validation_metrics", validate_for_hours)
    stage = frozen(tmp_path, validate_every_samples=8)
    run(stage)
    training = [row for row in rows(stage) if "train/loss" in row]
    assert len(training) == 10
    assert training[-1]["system/elapsed_s"] > 9 * 10_000
    # 8 samples in the 10,000 s of each validation would be less than 0.001 per second.
    assert all(row["system/samples_per_s"] > 0.01 for row in training)


def test_only_known_peaks_in_16_bits_count():
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.BFLOAT16_MIXED) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", Precision.FLOAT16_MIXED) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.FLOAT32) is None
    assert peak_flops("Another GPU", Precision.BFLOAT16_MIXED) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", Precision.BFLOAT16_MIXED) == 312e12
    assert peak_flops("NVIDIA RTX A1000", Precision.BFLOAT16_MIXED) is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Precision.BFLOAT16_MIXED) is None


def test_what_a_stage_runs_on_is_in_its_work_and_its_manifest(tmp_path: Path):
    stage = frozen(tmp_path)
    run(stage)
    hardware = finished(stage).manifest.hardware
    assert (hardware["devices"], hardware["nodes"], hardware["strategy"]) == (1, 1, "single")
    assert hardware["device"]
    assert hardware["cpus"] >= 1
    assert hardware["memory_gib"] > 0
    assert hardware["torch"] == torch.__version__
    assert read_hardware(stage.work) == hardware
