"""`trainer=auto`: the least sharded strategy whose state fits, and why."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import tiny
from torch import nn

from pipeline.config import Offload, StrategyName, TrainerSettings
from pipeline.errors import UserError
from pipeline.training.stage import run_stage
from pipeline.training.strategies.choose import Device, build_strategy, choose_strategy
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.progress import read_failure

GPU = Device("H100", 80 * 2**30, is_cuda=True)


def settings(devices: int, **changes: object) -> TrainerSettings:
    return tiny.TRAINER.model_copy(update={"devices": devices, **changes})


@pytest.mark.parametrize(
    ("millions", "devices", "strategy", "offload"),
    [
        (100, 1, StrategyName.DDP, Offload.NONE),
        (1_200, 8, StrategyName.DDP, Offload.NONE),
        (3_500, 8, StrategyName.ZERO2, Offload.NONE),
        (12_000, 8, StrategyName.ZERO3, Offload.NONE),
        (3_500, 1, StrategyName.ZERO3, Offload.OPTIMIZER),
        (40_000, 8, StrategyName.ZERO3, Offload.OPTIMIZER),
        (20_000, 1, StrategyName.ZERO3, Offload.PARAMETERS),
    ],
)
def test_more_parameters_are_sharded_and_offloaded_further(
    millions: int, devices: int, strategy: StrategyName, offload: Offload
):
    choice = choose_strategy(settings(devices), millions * 10**6, GPU)
    assert (choice.strategy, choice.offload) == (strategy, offload)
    assert f"{millions:,} M parameters need" in choice.reason
    assert "GiB of H100's 80 GiB" in choice.reason


def test_on_cpus_nothing_is_sharded_and_what_is_configured_is_taken():
    cpu = Device("CPU", 2**30, is_cuda=False)
    assert choose_strategy(settings(2), 10**10, cpu).strategy is StrategyName.DDP
    assert choose_strategy(settings(2, strategy=StrategyName.ZERO1), 1, GPU).strategy is StrategyName.ZERO1


def test_where_deepspeed_cannot_be_loaded_one_line_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pipeline.training.strategies.zero", None)
    with pytest.raises(
        UserError, match=r"trainer=zero2 needs DeepSpeed, which cannot be loaded here .* or use trainer=ddp"
    ):
        build_strategy(settings(1, strategy=StrategyName.ZERO2), nn.Linear(2, 2))


def test_where_its_compiler_is_missing_one_line_says_so(tmp_path: Path):
    """As DeepSpeed does on a machine with a GPU and without nvcc."""
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class MissingCUDAException(Exception):\n    pass\n\n\n"
        "raise MissingCUDAException('CUDA_HOME does not exist, unable to compile CUDA op(s)')\n"
    )
    stage = tiny.frozen(tmp_path, strategy=StrategyName.ZERO3)
    run_stage(tiny.data_of(stage), Event())
    places = [str(tmp_path), str(Path(tiny.__file__).parent)]
    command = [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)]
    subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)})
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "cannot be loaded here (CUDA_HOME does not exist, unable to compile CUDA op(s))" in failure.message
