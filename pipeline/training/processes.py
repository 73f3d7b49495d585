"""Which of a stage's processes this one is, and who started it."""

import os
from pathlib import Path

from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment


def is_started_by_srun() -> bool:
    """Whether this process is a task of the stage's own Slurm job, which has one task for each device.

    Slurm's own variables cannot tell: every process that is started inside any job has them.
    """
    return os.environ.get("UNCLIP_LAUNCHED_BY") == "slurm"


def process_rank() -> int:
    """This process's number among those that train one stage, before a process group exists."""
    return int(os.environ.get("SLURM_PROCID" if is_started_by_srun() else "LOCAL_RANK", "0"))


def process_environment(world_size: int) -> ClusterEnvironment:
    """Lightning's view of the same, chosen rather than guessed; requeueing a job is left to its batch script."""
    if is_started_by_srun() and world_size > 1:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def tell_of_interruption() -> bool:
    """Leave the mark by which a batch script knows that its stage stopped and can go on; whether it asked for one.

    Of the processes of a stage the first one tells.
    """
    marker = os.environ.get("UNCLIP_INTERRUPTED")
    if marker and process_rank() == 0:
        Path(marker).touch()
    return bool(marker)
