"""What a stage runs on, for its manifest and for whoever compares runs."""

import os
import platform
from pathlib import Path

import psutil
import torch

from pipeline.workflow.artifacts import write_json_atomically
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.ownership import Ownership
from pipeline.workflow.progress import HARDWARE


def record_hardware(frozen: FrozenStage, ownership: Ownership | None, strategy: str = "single") -> None:
    """Write the device's name, the number of devices and nodes, how devices train together, and the node's means.

    The owner of the stage writes it; `strategy` is known once training begins. `devices` are those of all nodes. `cpus`
    are what this process may use; `memory_gib` is the node's.
    """
    if ownership is None:
        return
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
    if accelerator != "cpu":
        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return "Apple GPU"
    return _cpu_name()


def _cpu_name() -> str:
    """The processor's model; Python's own answer is empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
