"""Every training stage under DDP and ZeRO 1 to 3 on two processes (gloo): what they end with, and how they resume."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from ranks import log_of, run_on_ranks
from safetensors.torch import load_file
from tiny_runs import plan_stages, rows_of, run_until
from torch import Tensor

from pipeline.config import Offload, Precision
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage

STAGES = ("clip", "prior", "decoder", "upsampler", "judge")
ZERO = ("zero1", "zero2", "zero3")
BITS = {("zero1", stage) for stage in STAGES} | {("zero2", stage) for stage in STAGES} | {("zero3", "judge")}
"""Where the weights are those of DDP bit for bit. DeepSpeed's hooks for ZeRO-3 add nodes to autograd's graph, which
adds the gradients of what is used twice in another order then: identities in their place have the same effect."""

COMMON = [
    "trainer.devices=2",
    *(f"stage.{stage}.global_batch_size=8" for stage in STAGES),
    *(f"stage.{stage}.max_samples=32" for stage in STAGES),
]
EXACT = [f"stage.{stage}.optimizer.gradient_clip_norm=null" for stage in STAGES]
ROUNDED = [
    "trainer.micro_batch_size=2",
    *(f"stage.{stage}.optimizer.gradient_clip_norm=0.1" for stage in STAGES),
]
BFLOAT16 = ["trainer.precision=bf16-mixed", *ROUNDED]


@dataclass(frozen=True)
class World:
    """A place where every stage has outputs of its own under each strategy, and its inputs, made once, linked to."""

    place: Path

    def stage(self, name: str, group: str, strategy: str, overrides: list[str]) -> FrozenStage:
        base = self.place / group / "inputs"
        run_until(base, "embed", *COMMON, *overrides, "trainer.devices=1")
        artifacts = self.place / group / name / strategy / "artifacts"
        artifacts.mkdir(parents=True)
        for made in ("prepare", "clip", "embed"):
            if made != name:
                (artifacts / made).symlink_to(base / "artifacts" / made)
        planned = plan_stages(artifacts.parent, *COMMON, *overrides, f"trainer={strategy}")
        return planned[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    yield World(tmp_path_factory.mktemp("strategies"))
    torch.set_num_threads(threads)


def finished(stage: FrozenStage) -> Artifact:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None, log_of(stage)
    return artifact


def weights(stage: FrozenStage) -> dict[str, Tensor]:
    (file,) = finished(stage).path.glob("*.safetensors")
    return load_file(file)


def losses(stage: FrozenStage) -> list[float]:
    return [row["train/loss"] for row in rows_of(finished(stage)) if "train/loss" in row]


def run_all(world: World, group: str, overrides: list[str], stages: tuple[str, ...], strategies: tuple[str, ...]):
    """One launch for all: importing torch and DeepSpeed takes longer than training."""
    planned = {
        (name, strategy): world.stage(name, group, strategy, overrides) for name in stages for strategy in strategies
    }
    assert run_on_ranks(list(planned.values())) == [0, 0], "\n".join(map(log_of, planned.values()))
    return planned


def require_agreement(planned: dict[tuple[str, str], FrozenStage], *, rtol: float, atol: float, bits: set) -> None:
    for (name, strategy), stage in planned.items():
        reference = planned[name, "ddp"]
        assert f"training by {strategy} on 2 devices" in log_of(stage)
        own, expected = weights(stage), weights(reference)
        assert own.keys() == expected.keys()
        for key in expected:
            if (strategy, name) in bits:
                assert torch.equal(own[key], expected[key]), f"{name} by {strategy}: {key}"
            else:
                torch.testing.assert_close(
                    own[key], expected[key], rtol=rtol, atol=atol, msg=f"{name} {strategy} {key}"
                )
        assert losses(stage) == pytest.approx(losses(reference), rel=1e-4 if rtol < 1e-2 else 5e-2)


def test_in_float32_every_stage_learns_under_zero_what_it_learns_under_ddp(world: World):
    planned = run_all(world, "exact", EXACT, STAGES, ("ddp", *ZERO))
    require_agreement(planned, rtol=1e-3, atol=1e-5, bits=BITS)


def test_with_accumulation_and_clipping_the_weights_agree_to_rounding(world: World):
    planned = run_all(world, "rounded", ROUNDED, ("clip", "decoder"), ("ddp", "zero2", "zero3"))
    require_agreement(planned, rtol=1e-3, atol=1e-5, bits=set())


def test_in_bf16_the_weights_agree_to_rounding(world: World):
    planned = run_all(world, "bf16", BFLOAT16, ("prior", "upsampler"), ("ddp", "zero2", "zero3"))
    require_agreement(planned, rtol=5e-2, atol=1e-3, bits=set())


@pytest.mark.slow
@pytest.mark.parametrize(("group", "overrides"), [("rounded", ROUNDED), ("bf16", BFLOAT16)])
def test_every_stage_agrees_with_ddp_under_accumulation_clipping_and_bf16(
    world: World, group: str, overrides: list[str]
):
    planned = run_all(world, f"{group}-all", overrides, STAGES, ("ddp", *ZERO))
    is_rough = group == "bf16"
    require_agreement(planned, rtol=5e-2 if is_rough else 1e-3, atol=1e-3 if is_rough else 1e-5, bits=set())


@pytest.mark.slow
def test_state_in_host_memory_changes_nothing_but_rounding(world: World):
    planned = run_all(world, "offload", EXACT, ("decoder",), ("ddp", "zero2_offload", "zero3_offload"))
    assert "training by zero2, offload optimizer on 2" in log_of(planned["decoder", "zero2_offload"])
    assert "training by zero3, offload parameters on 2" in log_of(planned["decoder", "zero3_offload"])
    for stage in planned.values():
        for key, expected in weights(planned["decoder", "ddp"]).items():
            torch.testing.assert_close(weights(stage)[key], expected, rtol=1e-3, atol=1e-5)


def test_a_strategy_leaves_torch_as_it_found_it(monkeypatch: pytest.MonkeyPatch):
    """For memory's sake ZeRO-3 puts a linear function of its own into torch, and leaves it there."""
    from pipeline.training.strategies.zero import ZeroStrategy

    linear = torch.nn.functional.linear
    strategy = ZeroStrategy(
        stage=3,
        offload=Offload.NONE,
        settings=tiny.TRAINER.deepspeed,
        precision=Precision.FLOAT32,
        collective_timeout_s=60,
        on_cuda=True,
    )
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: None)
    strategy.teardown()
    assert torch.nn.functional.linear is linear
