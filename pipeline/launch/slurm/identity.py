"""A process of a Slurm job, from the variables that Slurm and the batch script set."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.launch.identity import ProcessIdentity
from pipeline.workflow.ownership import JobStart


def identity_in_job(environment: Mapping[str, str]) -> ProcessIdentity:
    """The identity of a task that `srun` started: a stage's own job has one for each device."""
    mark = environment.get("UNCLIP_INTERRUPTED")
    return ProcessIdentity(
        rank=int(environment.get("SLURM_PROCID", "0")),
        world_size=int(environment.get("SLURM_NTASKS", "1")),
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        node_rank=int(environment.get("SLURM_NODEID", "0")),
        address=environment.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environment.get("MASTER_PORT", "0")),
        job=job_around(environment),
        interruption_mark=Path(mark) if mark else None,
    )


def job_around(environment: Mapping[str, str]) -> JobStart | None:
    """The start of the Slurm job in which a process runs; None outside of one."""
    job_id = environment.get("SLURM_JOB_ID")
    return JobStart(job_id, int(environment.get("SLURM_RESTART_COUNT", "0"))) if job_id else None
