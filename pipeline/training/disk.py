"""What a stage writes, and whether the disk holds it."""

import shutil
from pathlib import Path

from torch import nn

from pipeline.config import TrainerSettings, TrainingStageSettings
from pipeline.errors import DiskFullError
from pipeline.training.strategies.fragments import trained_parameters
from pipeline.workflow.progress import CHECKPOINTS

_GB = 1e9


def artifact_bytes(network: nn.Module) -> int:
    """What the network's weights take in an artifact."""
    return sum(each.nbytes for each in network.state_dict().values())


def checkpoint_bytes(network: nn.Module, settings: TrainingStageSettings) -> int:
    """What a checkpoint takes: what is in the artifact, and of what trains two moments and the average."""
    copies = 2 if settings.optimizer.ema_decay == 0 else 3
    return artifact_bytes(network) + copies * sum(each.nbytes for each in trained_parameters(network).values())


def training_bytes(network: nn.Module, settings: TrainingStageSettings, trainer: TrainerSettings) -> int:
    """What a stage that trains needs on disk: its artifact, and the checkpoints that it keeps, the next one among them.

    Where there is no room for one more, an old one makes it, but for the last.
    """
    return artifact_bytes(network) + max(2, trainer.keep_checkpoints) * checkpoint_bytes(network, settings)


def fewer_checkpoints(trainer: TrainerSettings) -> str:
    """The part of a remedy that is one only where more are kept than are needed to write the next."""
    return f", lower trainer.keep_checkpoints={trainer.keep_checkpoints}" if trainer.keep_checkpoints > 2 else ""


def require_disk(
    stage: str, network: nn.Module, settings: TrainingStageSettings, trainer: TrainerSettings, work: Path
) -> None:
    """Raise `DiskFullError` where the stage would fill the disk before its end; its own checkpoints are in it."""
    written = sum(file.stat().st_size for file in (work / CHECKPOINTS).rglob("*") if file.is_file())
    need = training_bytes(network, settings, trainer) - written
    free = shutil.disk_usage(work).free
    if need > free:
        each = checkpoint_bytes(network, settings)
        raise DiskFullError(
            f"stage {stage} will write {need / _GB:,.3f} GB (its weights, and {max(2, trainer.keep_checkpoints)} "
            f"checkpoints of {each / _GB:,.3f} GB) and the disk of {work} has {free / _GB:,.3f} GB left; "
            f"free some{fewer_checkpoints(trainer)}, or set paths.outputs"
        )
