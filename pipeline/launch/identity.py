"""This process among those that work on a stage, as its launcher started it. Only launchers read it anywhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.workflow.ownership import JobStart

LAUNCHED_BY = "UNCLIP_LAUNCHED_BY"
"""The environment variable by which a launcher marks the processes that it starts; its value is `launch.kind`."""


@dataclass(frozen=True)
class ProcessIdentity:
    """Which of a stage's processes this is.

    `world_size` is how many processes the launcher started, or None where the first process starts the others.
    The processes meet at `address` and `port`. `job` is the start of the batch job that this process is part of.
    `interruption_mark` is a file that the first process leaves when it was stopped and can go on. A process that
    `stops_with_parent` checkpoints and stops when the command that started it is gone.
    """

    rank: int = 0
    world_size: int | None = None
    local_rank: int = 0
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    job: JobStart | None = None
    interruption_mark: Path | None = None
    stops_with_parent: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def tell_of_interruption(self) -> bool:
        """Leave the mark that asks for another start; whether the launcher wants one."""
        if self.interruption_mark is not None and self.is_first:
            self.interruption_mark.touch()
        return self.interruption_mark is not None


def identity_here(environment: Mapping[str, str]) -> ProcessIdentity:
    """The identity where the first process of a stage starts the others, as Lightning does."""
    from pipeline.launch.slurm.identity import job_around

    # A command that somebody's own batch job runs starts again with that job.
    rank = int(environment.get("LOCAL_RANK", "0"))
    return ProcessIdentity(
        rank=rank,
        local_rank=rank,
        job=job_around(environment),
        stops_with_parent=LAUNCHED_BY in environment,
    )


def this_process() -> ProcessIdentity:
    """The identity of this process."""
    from pipeline.launch.launcher import launcher_named

    return launcher_named(os.environ.get(LAUNCHED_BY, "local")).identity(os.environ)
