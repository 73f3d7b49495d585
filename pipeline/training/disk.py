"""What a stage writes, and whether the disk holds it."""

import shutil
from pathlib import Path

from torch import nn

from pipeline.config import TrainerSettings, TrainingStageSettings
from pipeline.errors import UserError
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
    """What a stage that trains needs on disk at most: its artifact, the checkpoints that it keeps, and the next one."""
    return artifact_bytes(network) + (trainer.keep_checkpoints + 1) * checkpoint_bytes(network, settings)


def require_disk(
    stage: str, network: nn.Module, settings: TrainingStageSettings, trainer: TrainerSettings, work: Path
) -> None:
    """Raise `UserError` where the disk would be full before the stage is finished; its own checkpoints are in it."""
    written = sum(file.stat().st_size for file in (work / CHECKPOINTS).rglob("*") if file.is_file())
    need = training_bytes(network, settings, trainer) - written
    free = shutil.disk_usage(work).free
    if need > free:
        each = checkpoint_bytes(network, settings)
        raise UserError(
            f"stage {stage} will write {need / _GB:,.1f} GB (its weights, trainer.keep_checkpoints="
            f"{trainer.keep_checkpoints} and one more checkpoint of {each / _GB:,.1f} GB) and the disk of {work} has "
            f"{free / _GB:,.1f} GB left; free some, lower trainer.keep_checkpoints, or set paths.outputs"
        )
