"""Which strategy a stage trains by, and why: chosen when it starts, where `trainer.strategy` is auto."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
from torch import nn

from pipeline.config import ActivationCheckpointing, Offload, Precision, StrategyName, TrainerSettings
from pipeline.errors import UserError
from pipeline.launch.identity import this_process
from pipeline.training.hardware import accelerator_of, require_devices
from pipeline.training.strategies.fragments import trained_parameters
from pipeline.training.strategies.portable import PlainStrategy, PortableStrategy, ReplicatedStrategy

SHARE_FOR_STATE = {ActivationCheckpointing.NONE: 0.6, ActivationCheckpointing.BLOCKS: 0.75}
"""Of a device's memory; the rest is for activations, of which nothing is known before the first step."""

SHARE_FOR_EVALUATION = 0.9
"""Of the first process's device: its state and, whole, the averaged weights, without which nothing is validated."""

_WEIGHT, GRADIENT_BYTES, _MOMENTS, _AVERAGE = 4, 4, 8, 4
"""Bytes per parameter, all in float32."""

_OFFLOADED = {
    # The optimiser's weights and two sets of gradients: as they are gathered, and as the optimiser takes them.
    Offload.OPTIMIZER: _WEIGHT + 2 * GRADIENT_BYTES + _MOMENTS + _AVERAGE,
    Offload.PARAMETERS: 2 * _WEIGHT + 2 * GRADIENT_BYTES + _MOMENTS + _AVERAGE,
}
"""Bytes per parameter of what DeepSpeed keeps in host memory, shared between the nodes."""

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a process trains on. `memory_bytes` is the memory of its GPU, or its share of the host's."""

    name: str
    memory_bytes: int
    is_cuda: bool


@dataclass(frozen=True)
class StrategyChoice:
    """A strategy and the reason for it, in half a sentence."""

    strategy: StrategyName
    offload: Offload
    reason: str

    @property
    def title(self) -> str:
        """As the config names it, such as `zero2` or `zero3, offload parameters`."""
        return self.strategy.value + (f", offload {self.offload.value}" if self.offload is not Offload.NONE else "")


def find_device(settings: TrainerSettings) -> Device:
    """The device of this process. Raises `UserError` if there are fewer devices than `trainer.devices` asks for."""
    require_devices(settings)
    started = this_process().world_size
    if started is not None and started != settings.world_size:
        raise UserError(
            f"trainer.devices={settings.devices} x trainer.num_nodes={settings.num_nodes} is {settings.world_size} "
            f"processes and the launcher started {started}; `unclip submit` asks for the right number"
        )
    if accelerator_of(settings) == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, is_cuda=True)
    return Device("CPU", psutil.virtual_memory().total // settings.devices, is_cuda=False)


def choose_strategy(settings: TrainerSettings, parameters: int, device: Device) -> StrategyChoice:
    """The configured strategy, or the least sharded one whose state fits the device."""
    if settings.strategy is not StrategyName.AUTO:
        return StrategyChoice(settings.strategy, settings.offload, "as configured")
    if not device.is_cuda:
        return StrategyChoice(StrategyName.DDP, Offload.NONE, "on CPUs sharding saves no memory")
    room = SHARE_FOR_STATE[settings.activation_checkpointing] * device.memory_bytes
    shards = settings.world_size
    for strategy in (StrategyName.DDP, StrategyName.ZERO2, StrategyName.ZERO3):
        if shards == 1 and strategy is not StrategyName.DDP:
            continue
        bytes_per_parameter = state_bytes_per_parameter(strategy, Offload.NONE, shards)
        if bytes_per_parameter * parameters <= room and _is_room_to_evaluate(bytes_per_parameter, parameters, device):
            return StrategyChoice(strategy, Offload.NONE, _reason(parameters, bytes_per_parameter, device))
    on_device = state_bytes_per_parameter(StrategyName.ZERO3, Offload.OPTIMIZER, shards)
    if on_device * parameters <= room and _is_room_to_evaluate(on_device, parameters, device):
        return StrategyChoice(StrategyName.ZERO3, Offload.OPTIMIZER, _reason(parameters, on_device, device))
    return StrategyChoice(
        StrategyName.ZERO3, Offload.PARAMETERS, f"{_reason(parameters, on_device, device)} are too many"
    )


def state_bytes_per_parameter(strategy: StrategyName, offload: Offload, shards: int) -> float:
    """What a device holds of each parameter while it trains: weight, gradient, the optimiser's moments and average."""
    optimizer = _MOMENTS + _AVERAGE
    if offload is not Offload.NONE:
        # Gradients are on the device in buckets alone.
        return _WEIGHT / shards if strategy is StrategyName.ZERO3 else _WEIGHT
    match strategy:
        case StrategyName.AUTO | StrategyName.DDP:
            return _WEIGHT + GRADIENT_BYTES + optimizer
        case StrategyName.ZERO1:
            # Of ZeRO-1 and 2 the optimiser's float32 weights are a copy, sharded too.
            return _WEIGHT + GRADIENT_BYTES + (_WEIGHT + optimizer) / shards
        case StrategyName.ZERO2:
            return _WEIGHT + (_WEIGHT + GRADIENT_BYTES + optimizer) / shards
        case StrategyName.ZERO3:
            # ZeRO-3 too copies weights that are float32 already: it compares a device with its name to see if it must.
            return (2 * _WEIGHT + GRADIENT_BYTES + optimizer) / shards


def _is_room_to_evaluate(bytes_per_parameter: float, parameters: int, device: Device) -> bool:
    return (bytes_per_parameter + _AVERAGE) * parameters <= SHARE_FOR_EVALUATION * device.memory_bytes


def require_room_to_evaluate(parameters: int, device: Device) -> None:
    """Raise `UserError` for a network that does not fit on one GPU whole: validation needs it so."""
    if device.is_cuda and not _is_room_to_evaluate(0, parameters, device):
        raise UserError(
            f"validation and samples need the averaged weights on one device: of {parameters / 1e6:,.0f} M parameters "
            f"{_AVERAGE * parameters / _GIB:.1f} GiB, and {device.name} has {device.memory_bytes / _GIB:.0f} GiB; use "
            "a device with more memory or a smaller network"
        )


def _reason(parameters: int, bytes_per_parameter: float, device: Device) -> str:
    need, have = parameters * bytes_per_parameter / _GIB, device.memory_bytes / _GIB
    return f"{parameters / 1e6:,.0f} M parameters need {need:.1f} GiB of {device.name}'s {have:.0f} GiB for their state"


def require_host_memory(settings: TrainerSettings, choice: StrategyChoice, parameters: int, host_bytes: int) -> None:
    """Raise `UserError` if a node's memory, `host_bytes`, is too small for what would be offloaded to it."""
    if choice.offload is Offload.NONE:
        return
    need = _OFFLOADED[choice.offload] * parameters / settings.num_nodes
    if need > host_bytes:
        raise UserError(
            f"trainer={choice.title}: of {parameters / 1e6:,.0f} M parameters {need / _GIB:.1f} GiB would be in the "
            f"host memory of each node, which has {host_bytes / _GIB:.1f} GiB; use more devices without offload, more "
            "trainer.num_nodes, or a smaller network"
        )


def _without_deepspeed(choice: StrategyChoice, error: Exception) -> str:
    said = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"trainer={choice.strategy.value} needs DeepSpeed, which cannot be loaded here ({said}); install it, and where "
        "it asks for CUDA_HOME or nvcc the CUDA toolkit of torch's version, or use trainer=ddp"
    )


def build_strategy(
    settings: TrainerSettings, network: nn.Module, report: Callable[[str], object] = print
) -> tuple[PortableStrategy, StrategyChoice]:
    """The strategy of a stage that trains `network`. `report` is told when one of its processes dies.

    Raises `UserError` for what the machine, or the strategy, cannot do.
    """
    device = find_device(settings)
    parameters = sum(each.numel() for each in trained_parameters(network).values())
    choice = choose_strategy(settings, parameters, device)
    require_room_to_evaluate(parameters, device)
    require_host_memory(settings, choice, parameters, psutil.virtual_memory().total)
    if choice.strategy is StrategyName.DDP:
        timeout = timedelta(seconds=settings.collective_timeout_s)
        root = torch.device("cuda", 0) if device.is_cuda else torch.device("cpu")
        if settings.world_size == 1:
            return PlainStrategy(root, title=choice.title), choice
        # Gradients that are no views of what is communicated would be in memory twice.
        strategy = ReplicatedStrategy(timeout=timeout, gradient_as_bucket_view=True, title=choice.title, report=report)
        return strategy, choice
    if settings.precision is Precision.FLOAT16_MIXED:
        raise UserError(f"trainer.precision=16-mixed works with trainer=ddp alone; for {choice.title} use bf16-mixed")
    accelerator = "cuda" if device.is_cuda else "cpu"
    # Left alone, DeepSpeed takes a GPU that it finds, though the stage trains on CPUs.
    os.environ["DS_ACCELERATOR"] = accelerator
    try:
        # Importing DeepSpeed takes seconds, which stages without it are spared.
        from pipeline.training.strategies.zero import ZeroStrategy
    except Exception as error:  # as it loads, DeepSpeed raises errors of its own for what the machine lacks
        raise UserError(_without_deepspeed(choice, error)) from error
    stages = {StrategyName.ZERO1: 1, StrategyName.ZERO2: 2, StrategyName.ZERO3: 3}
    strategy = ZeroStrategy(
        stage=stages[choice.strategy],
        offload=choice.offload,
        settings=settings.deepspeed,
        precision=settings.precision,
        collective_timeout_s=settings.collective_timeout_s,
        on_cuda=device.is_cuda,
        title=choice.title,
        report=report,
    )
    return strategy, choice
