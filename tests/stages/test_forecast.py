"""The counts of real stages, held to what was measured on an H200 (docs/figures.md)."""

from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.compose import compose_members
from pipeline.config import stage_trainer, validate
from pipeline.forecast.count import count_training
from pipeline.forecast.rehearsal import Rehearsal, Training
from pipeline.training.module import StageModule
from stages.catalog import CATALOG

GB = 1e9


def rehearsal_of(name: str, *overrides: str) -> Rehearsal:
    """A stage whose data is not known."""
    (member,) = compose_members("unclip plan", overrides)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    found: dict[str, Rehearsal] = {}
    for each, values in member.config.stage.items():
        own = {key: value for key, value in values.items() if key not in ("kind", "trainer")}
        declaration = CATALOG.stages[values["kind"]]
        if values["kind"] == "prepare":
            declaration = replace(declaration, rehearse=None)
        found[each] = Rehearsal(
            each,
            declaration,
            validate(declaration.settings, own, f"stage.{each}"),
            stage_trainer(member.config, values.get("trainer") or {}, each),
            {
                needed.name: tuple(before for before in found.values() if before.declaration.output == needed.name)
                for needed in declaration.inputs
            },
            mode=mode,
        )
        if each == name:
            return found[each]
    raise AssertionError(f"no stage {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gflop", "activations_gb"),
    [("clip", 20.4, 40.0), ("prior", None, 23.4), ("decoder", 244.0, 62.0)],
)
def test_flops_and_activations_are_within_a_fifth_of_those_on_a_gpu(
    name: str, gflop: float | None, activations_gb: float, monkeypatch: pytest.MonkeyPatch
):
    # It was measured with autocast alone, when normalisation was in float32.
    monkeypatch.setattr(StageModule, "_castables", [])
    rehearsal = rehearsal_of(name, "experiment=emoji")
    training = rehearsal.rehearsed
    assert isinstance(training, Training)
    samples = training.module.stage_settings.global_batch_size
    count = count_training(
        training.module, rehearsal.batch(samples, training.image_size, training.tokenizer), rehearsal.trainer.precision
    )
    assert count.activation_bytes == pytest.approx(activations_gb * GB, rel=0.2)
    if gflop is not None:
        assert count.flops / samples == pytest.approx(gflop * 1e9, rel=0.05)


@pytest.mark.slow
def test_a_decoder_whose_normalisation_is_in_bf16_keeps_a_quarter_less(monkeypatch: pytest.MonkeyPatch):
    def activation_bytes() -> int:
        rehearsal = rehearsal_of("decoder", "experiment=emoji")
        training = rehearsal.rehearsed
        assert isinstance(training, Training)
        batch = rehearsal.batch(16, training.image_size, training.tokenizer)
        return count_training(training.module, batch, rehearsal.trainer.precision).activation_bytes

    with_cast_weights = activation_bytes()
    monkeypatch.setattr(StageModule, "_castables", [])
    assert with_cast_weights < 0.75 * activation_bytes()


@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler", "judge"])
def test_every_stage_that_trains_is_counted_by_its_own_losses(name: str):
    rehearsal = rehearsal_of(name, "experiment=smoke")
    training = rehearsal.rehearsed
    assert isinstance(training, Training)
    count = count_training(
        training.module, rehearsal.batch(4, training.image_size, training.tokenizer), rehearsal.trainer.precision
    )
    assert count.flops > 0
    assert count.activation_bytes > 0
