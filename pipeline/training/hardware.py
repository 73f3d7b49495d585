"""What a stage runs on, for its manifest and for whoever compares runs."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from pipeline.config import TrainerSettings
from pipeline.errors import UserError
from pipeline.workflow.progress import HARDWARE
from pipeline.workflow.sealed import write_json_atomically

if TYPE_CHECKING:
    from pipeline.training.context import Attempt


def accelerator_of(settings: TrainerSettings) -> Literal["cpu", "cuda"]:
    """What a stage computes on, by Lightning's name: CUDA GPUs if the settings allow them and there are any, else CPUs.

    Lightning's own `auto` would also take an Apple GPU, which this code does not support.

    Raises `UserError` if a GPU is asked for and there is none.
    """
    if settings.accelerator != "cpu" and torch.cuda.is_available():
        return "cuda"
    if settings.accelerator == "gpu":
        raise UserError("trainer.accelerator=gpu and this machine has no CUDA GPU; use trainer.accelerator=cpu or auto")
    return "cpu"


def require_devices(settings: TrainerSettings) -> None:
    """Raise `UserError` if there are fewer devices here than `trainer.devices` asks for."""
    is_cuda = accelerator_of(settings) == "cuda"
    there = torch.cuda.device_count() if is_cuda else os.cpu_count() or 1
    if settings.devices > there:
        kind = "GPU" if is_cuda else "CPU core"
        raise UserError(
            f"trainer.devices={settings.devices} and this machine has {there} {kind}{'s' if there > 1 else ''}; "
            f"use at most {there}"
        )


def device_of(settings: TrainerSettings, local_rank: int) -> torch.device:
    """What the process of this number on its node trains on; a GPU is torch's current one from here on.

    Raises `UserError` where there is no such device.
    """
    require_devices(settings)
    if accelerator_of(settings) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    # Or whatever names no number would come to be on the first GPU.
    torch.cuda.set_device(device)
    return device


def record_hardware(attempt: "Attempt", strategy: str = "single") -> None:
    """Write what the stage runs on: device, numbers of devices and nodes, strategy, CPUs, memory, torch's version.

    Only the owner of the stage writes it. `strategy` is known once training begins. `devices` counts those of all
    nodes. `cpus` is how many this process may use. `memory_gib` is the node's.
    """
    if not attempt.process.is_first:
        return
    frozen = attempt.frozen
    tasks = frozen.tasks
    is_single = tasks.total == 1 and strategy == "ddp"
    hardware = {
        "device": _device_name(frozen.trainer.accelerator),
        "devices": tasks.total,
        "nodes": tasks.nodes,
        "strategy": "single" if is_single else strategy,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
    }
    write_json_atomically(frozen.work / HARDWARE, hardware)


def _device_name(accelerator: str) -> str:
    return torch.cuda.get_device_name() if accelerator != "cpu" and torch.cuda.is_available() else _cpu_name()


def _cpu_name() -> str:
    """The processor's model; Python's own answer is empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
