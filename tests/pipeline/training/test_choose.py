"""`trainer=auto`: the least sharded strategy whose state fits, and why."""

import pytest
import tiny

from pipeline.config import Offload, StrategyName, TrainerSettings
from pipeline.training.strategies.choose import Device, choose_strategy

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
