"""Rates from peaks, memory that does not fit, a disk that is too small."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.compose import compose_members
from pipeline.config import ForecastSettings, Precision, RunConfig
from pipeline.errors import UserError
from pipeline.forecast.estimate import Forecast, StageForecast, forecast
from pipeline.training import disk
from pipeline.training.disk import artifact_bytes, checkpoint_bytes, require_disk, training_bytes
from pipeline.training.measurements import peak_flops
from pipeline.workflow.plan import plan_run
from tests.support import tiny

WITHOUT = ("judge", "judge_clip", "decoder", "upsampler", "evaluate", "export")
SMALL = ("experiment=smoke", "tracking=none", *(f"~stage.{name}" for name in WITHOUT))
NAMES_OF_DEVICES = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "l40s": "NVIDIA L40S",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> RunConfig:
    (member,) = compose_members("unclip plan", [*SMALL, *overrides])
    return member.config


def stage(made: Forecast, name: str) -> StageForecast:
    return next(each for each in made.stages if each.name == name)


def settings() -> ForecastSettings:
    found = config().forecast
    assert found is not None
    return found


def test_the_peaks_are_those_by_which_utilisation_is_measured():
    peaks = {name: each.peak_tflops[Precision.BFLOAT16_MIXED] for name, each in settings().devices.items()}
    for name, device_name in NAMES_OF_DEVICES.items():
        assert peak_flops(device_name, Precision.BFLOAT16_MIXED) == 1e12 * peaks[name], name


def test_on_a_named_device_time_and_cost_follow_from_peak_share_and_price():
    asked = ("forecast.device=h100", "forecast.mfu=0.5", "forecast.price_per_hour=3", "trainer.precision=bf16-mixed")
    made = forecast(plan_run(config(*asked, "trainer.devices=2")), only=["clip"])
    clip = stage(made, "clip")
    assert clip.flops_per_sample
    assert clip.samples_per_s == pytest.approx(2 * 0.5 * 989e12 / clip.flops_per_sample)
    assert clip.samples_per_s
    assert clip.duration_s
    assert clip.duration_s == pytest.approx(64 / clip.samples_per_s)
    assert clip.device_hours == pytest.approx(2 * clip.duration_s / 3600)
    assert "as set by forecast.mfu" in clip.notes[0]
    assert made.target.price_per_hour == 3


def test_what_is_not_known_is_left_unknown_with_its_remedy():
    clip = stage(forecast(plan_run(config("forecast.device=h100")), only=["clip"]), "clip")
    assert clip.duration_s is None
    assert "no peak of h100 in bf16-products; set trainer.precision=bf16-mixed" in clip.notes
    assert clip.flops_per_sample is not None


def test_a_measured_share_of_the_peak_tells_nothing_of_networks_of_another_size():
    asked = config("forecast.device=h200", "trainer.precision=bf16-mixed")
    clip = stage(forecast(plan_run(asked), only=["clip"]), "clip")
    assert clip.duration_s is None
    assert any("are far from what was measured on h200" in note and "forecast.mfu" in note for note in clip.notes)


def test_a_stage_that_does_not_fit_is_told_which_micro_batch_would():
    small = ("forecast.device=h100", "forecast.devices.h100.memory_gib=0.022", "trainer.precision=bf16-mixed")
    made = forecast(plan_run(config(*small, "stage.prior.global_batch_size=32")), only=["prior"])
    prior = stage(made, "prior")
    assert prior.memory_bytes is not None
    assert prior.memory_bytes > made.target.memory_bytes
    assert re.search(r"does not fit the .* GiB of h100: set stage.prior.trainer.micro_batch_size=\d+$", prior.notes[0])


def clip_with(*changes: str) -> tuple[float, float]:
    """FLOPs of a sample and bytes in memory."""
    asked = ("forecast.device=h200", "trainer.precision=bf16-mixed", *changes)
    clip = stage(forecast(plan_run(config(*asked)), only=["clip"]), "clip")
    assert clip.flops_per_sample
    assert clip.memory_bytes
    return clip.flops_per_sample, clip.memory_bytes


@pytest.mark.parametrize("change", ["trainer.activation_checkpointing=blocks", "trainer.micro_batch_size=8"])
def test_what_is_computed_again_costs_up_to_a_third_more_flops(change: str):
    plain, again = clip_with()[0], clip_with(change)[0]
    assert plain < again <= 1.34 * plain


def test_checkpointed_activations_spare_memory():
    assert clip_with("trainer.activation_checkpointing=blocks")[1] < clip_with()[1]


def test_here_the_stages_are_tried():
    made = forecast(plan_run(config("forecast.trial_s=0.01")), only=["embed", "prior"])
    for name in ("embed", "prior"):
        tried = stage(made, name)
        assert tried.duration_s, name
        assert tried.processor_s, name
        assert tried.samples_per_s, name


def test_a_checkpoint_has_weights_two_moments_and_the_average():
    network = nn.Linear(100, 10)
    averaged = tiny.learner_module().stage_settings
    plain = averaged.model_copy(update={"optimizer": averaged.optimizer.model_copy(update={"ema_decay": 0.0})})
    assert artifact_bytes(network) == 4 * 1010
    assert checkpoint_bytes(network, averaged) == 4 * 4 * 1010
    assert checkpoint_bytes(network, plain) == 3 * 4 * 1010


def test_a_disk_that_cannot_hold_artifact_and_checkpoints_is_refused_before_training(
    tmp_path: Path,
):
    with torch.device("meta"):
        network = nn.Linear(10**6, 10**6)
    own = tiny.learner_module().stage_settings
    need = training_bytes(network, own, tiny.TRAINER)
    assert need == (1 + 4 * tiny.TRAINER.keep_checkpoints) * 4 * (10**12 + 10**6)
    three = tiny.TRAINER.model_copy(update={"keep_checkpoints": 3})
    with pytest.raises(UserError, match=r"stage decoder will write .* GB .* lower trainer.keep_checkpoints=3") as error:
        require_disk("decoder", network, own, three, tmp_path)
    assert "\n" not in str(error.value)
    require_disk("decoder", nn.Linear(2, 2), own, tiny.TRAINER, tmp_path)


def test_checkpoints_that_are_there_already_need_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network, own = nn.Linear(1000, 100), tiny.learner_module().stage_settings
    need = training_bytes(network, own, tiny.TRAINER)
    written = tmp_path / "checkpoints" / "samples-000000000008.ckpt" / "part"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(checkpoint_bytes(network, own)))

    class Disk:
        free = need - 1

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _path: Disk)
    require_disk("decoder", network, own, tiny.TRAINER, tmp_path)
    written.unlink()
    with pytest.raises(UserError, match="will write"):
        require_disk("decoder", network, own, tiny.TRAINER, tmp_path)
