"""`trainer=auto`: the least sharded strategy whose state fits, and why."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator
from torch import nn

from pipeline.config import Offload, StrategyName, TrainerSettings
from pipeline.errors import UserError
from pipeline.training.hardware import accelerator_of
from pipeline.training.inference import inference_fabric
from pipeline.training.stage import run_stage
from pipeline.training.strategies.choose import (
    Device,
    build_strategy,
    choose_strategy,
    require_host_memory,
    require_room_to_evaluate,
)
from pipeline.training.strategies.portable import ReplicatedStrategy
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.progress import read_failure
from tests.support import ROOT, tiny

GPU = Device("H100", 80 * 2**30, is_cuda=True)


def settings(devices: int, **changes: object) -> TrainerSettings:
    return tiny.TRAINER.model_copy(update={"devices": devices, **changes})


@pytest.mark.parametrize(
    ("millions", "devices", "strategy", "offload"),
    [
        (100, 1, StrategyName.DDP, Offload.NONE),
        (1_200, 8, StrategyName.DDP, Offload.NONE),
        (3_500, 8, StrategyName.ZERO2, Offload.NONE),
        (11_000, 8, StrategyName.ZERO3, Offload.NONE),
        # The state alone would fit, with 33.5 of 48 GiB, but not beside the averages that are evaluated, 44.7 GiB.
        (12_000, 8, StrategyName.ZERO3, Offload.OPTIMIZER),
        (3_500, 1, StrategyName.ZERO3, Offload.OPTIMIZER),
        (18_000, 8, StrategyName.ZERO3, Offload.PARAMETERS),
        (13_000, 1, StrategyName.ZERO3, Offload.PARAMETERS),
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


def test_a_network_that_no_device_holds_in_whole_is_refused():
    require_room_to_evaluate(19 * 10**9, GPU)
    require_room_to_evaluate(20 * 10**9, Device("CPU", 1, is_cuda=False))
    with pytest.raises(UserError, match=r"of 20,000 M parameters 74.5 GiB, and H100 has 80 GiB; use a device"):
        require_room_to_evaluate(20 * 10**9, GPU)


def test_what_host_memory_cannot_hold_is_not_offloaded():
    zero3, giga = settings(8, strategy=StrategyName.ZERO3), 10**9
    chosen = {
        offload: choose_strategy(zero3.model_copy(update={"offload": offload}), 4 * giga, GPU) for offload in Offload
    }
    require_host_memory(zero3, chosen[Offload.NONE], 4 * giga, host_bytes=1)
    require_host_memory(zero3, chosen[Offload.OPTIMIZER], 4 * giga, host_bytes=100 * giga)
    with pytest.raises(
        UserError, match=r"trainer=zero3, offload parameters: of 4,000 M parameters 104.3 GiB .* has 93.1 GiB; use more"
    ):
        require_host_memory(zero3, chosen[Offload.PARAMETERS], 4 * giga, host_bytes=100 * giga)
    two_nodes = zero3.model_copy(update={"num_nodes": 2})
    require_host_memory(two_nodes, chosen[Offload.PARAMETERS], 4 * giga, host_bytes=100 * giga)


def test_a_stage_looks_at_host_memory_before_it_offloads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    offloading = settings(1, strategy=StrategyName.ZERO2, offload=Offload.OPTIMIZER)
    with pytest.raises(UserError, match="in the host memory of each node"):
        build_strategy(offloading, nn.Linear(2, 2))


def test_replicated_gradients_are_in_memory_once():
    strategy, _ = build_strategy(settings(2, strategy=StrategyName.DDP), nn.Linear(2, 2))
    assert isinstance(strategy, ReplicatedStrategy)
    assert strategy._ddp_kwargs["gradient_as_bucket_view"]


def test_an_apple_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """Lightning takes one by itself, and then refuses the device that the strategy brings."""
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    automatic = settings(1, accelerator="auto")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert accelerator_of(automatic) == expected
    assert inference_fabric(automatic).device.type == expected


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
    places = [str(tmp_path), str(ROOT)]
    command = [sys.executable, "-m", "pipeline.training.worker", str(write_frozen(stage).path)]
    subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)})
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "cannot be loaded here (CUDA_HOME does not exist, unable to compile CUDA op(s))" in failure.message
