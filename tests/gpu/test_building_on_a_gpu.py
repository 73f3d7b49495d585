"""Networks are built and loaded on a GPU, and host memory has no copy of them."""

import gc
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.training.hardware import device_of
from pipeline.training.module import StageModule
from pipeline.workflow.progress import Outcome, read_failure
from stages.weights import give_weights, read_weights, without_weights
from tests.support import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MIB = 2**20


def build() -> nn.Module:
    """A network of 1 GiB, in layers of 64 MiB."""
    return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(16)))


def test_neither_building_nor_loading_takes_host_memory_for_the_network(tmp_path: Path):
    gpu = device_of(tiny.TRAINER.model_copy(update={"accelerator": "gpu"}), 0)
    torch.ones(1, device=gpu).cpu()  # the context takes host memory too
    process = psutil.Process()
    before = process.memory_full_info().uss
    with gpu:
        network = build()
    assert {each.device for each in network.parameters()} == {gpu}
    assert process.memory_full_info().uss - before < 128 * MIB
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    gc.collect()
    before = process.memory_full_info().uss
    loaded = without_weights(build)
    give_weights(loaded, read_weights(tmp_path / "weights.safetensors", gpu))
    assert process.memory_full_info().uss - before < 128 * MIB
    for own, expected in zip(loaded.parameters(), network.parameters(), strict=True):
        assert own.device == gpu
        assert torch.equal(own, expected)


def test_a_stage_builds_what_it_trains_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built: list[torch.device] = []
    hold = StageModule.hold_at_most

    def note(module: StageModule, micro_batch_size: int) -> None:
        built.extend(each.device for each in module.network.parameters())
        hold(module, micro_batch_size)

    monkeypatch.setattr(StageModule, "hold_at_most", note)
    stage = tiny.frozen(tmp_path, accelerator="gpu")
    assert tiny.run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert set(built) == {torch.device("cuda", 0)}
