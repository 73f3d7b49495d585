"""What a stage runs on, for its manifest and for whoever compares runs."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.workflow.frozen import FrozenStage


def describe_hardware(frozen: FrozenStage, strategy: str | None = None) -> dict[str, Any]:
    """The device's name, the number of devices and nodes, how devices train together, and the first node's means.

    `devices` are those of all nodes. `cpus` are what this process may use; `memory_gib` is the node's.
    """
    tasks = frozen.tasks
    return {
        "device": _device_name(frozen.trainer.accelerator),
        "devices": tasks.total,
        "nodes": tasks.nodes,
        "strategy": strategy or ("single" if tasks.total == 1 else "ddp"),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
    }


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
