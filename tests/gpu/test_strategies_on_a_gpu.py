"""Every stage on one CUDA GPU, in bf16: trained by DDP, ZeRO-2 and ZeRO-3, stopped, resumed and sampled from."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import log_of, run_on_ranks
from tiny_runs import TINY, plan_stages, rows_of, run_until

from pipeline.cli import main
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import latest_checkpoint_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1800),
]

STAGES = ("clip", "prior", "decoder", "upsampler", "judge")
STRATEGIES = ("ddp", "zero2", "zero3", "zero2_offload", "zero3_offload")
ON_A_GPU = [
    "trainer.accelerator=gpu",
    "trainer.precision=bf16-mixed",
    "trainer.checkpoint_every_samples=8",
    "trainer.keep_checkpoints=9",
    *(f"stage.{stage}.global_batch_size=8" for stage in STAGES),
    *(f"stage.{stage}.max_samples=32" for stage in STAGES),
]
HALF = "samples-000000000016"


def stage_of(outputs: Path, name: str, strategy: str) -> FrozenStage:
    return plan_stages(outputs, *ON_A_GPU, f"trainer={strategy}")[name]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_stage_trains_and_goes_on_from_half_way(tmp_path: Path, strategy: str):
    run_until(tmp_path / "inputs", "embed", *ON_A_GPU)
    for made in ("whole", "resumed"):
        (tmp_path / made / "artifacts").mkdir(parents=True)
        for stage in ("prepare", "clip", "embed"):
            shutil.copytree(tmp_path / "inputs" / "artifacts" / stage, tmp_path / made / "artifacts" / stage)
        shutil.rmtree(tmp_path / made / "artifacts" / "clip")
    whole = [stage_of(tmp_path / "whole", name, strategy) for name in STAGES]
    assert run_on_ranks(whole, processes=1, timeout_s=900) == [0], "\n".join(map(log_of, whole))
    resumed = [stage_of(tmp_path / "resumed", name, strategy) for name in STAGES]
    for stage, source in zip(resumed, whole, strict=True):
        target = stage.work / "checkpoints"
        target.mkdir(parents=True)
        shutil.copytree(source.work / "checkpoints" / f"{HALF}.ckpt", target / f"{HALF}.ckpt")
        shutil.copy(source.work / "checkpoints" / f"{HALF}.json", target)
    assert run_on_ranks(resumed, processes=1, timeout_s=900) == [0], "\n".join(map(log_of, resumed))
    for stage in (*whole, *resumed):
        artifact = stage.store.find(stage.stage, stage.fingerprint)
        assert artifact is not None
        assert artifact.manifest.hardware["device"] == torch.cuda.get_device_name()
        assert latest_checkpoint_samples(stage.work) == 32
    for before, after in zip(whole, resumed, strict=True):
        assert f"resuming from {HALF}.ckpt" in log_of(after)
        assert losses(after) == pytest.approx(losses(before)[2:], rel=5e-2)


def losses(stage: FrozenStage) -> list[float]:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None
    return [row["train/loss"] for row in rows_of(artifact) if "train/loss" in row]


def test_a_run_on_the_gpu_is_sampled_from(tmp_path: Path):
    where = [f"paths.outputs={tmp_path}", "run.name=gpu"]
    assert main(["run", *TINY, *ON_A_GPU, *where]) == 0
    assert main(["sample", "gpu", "a red circle", "--outputs", str(tmp_path), "--output", str(tmp_path / "made")]) == 0
    assert list((tmp_path / "made").glob("*.png"))
