"""What a Slurm job is asked for: `launch` of kind slurm."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.config import NotNegative, Positive, PositiveFloat, Settings, validate
from pipeline.launch.launcher import LaunchSettings
from pipeline.secrecy import SECRET_NAME
from pipeline.workflow.causes import Cause

SlurmValue = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""A value that Slurm reads: one line without control characters."""


class GpuRequest(StrEnum):
    """How a cluster wants to be asked for GPUs."""

    NONE = "none"
    GRES = "gres"
    GPUS_PER_NODE = "gpus-per-node"


class Retries(Settings):
    """What follows a failure: how often a stage starts again after which cause, in one job, and with what.

    Memory and time limit are multiplied by the factors after a failure for want of them. A node is left out after
    `exclude_after` failures on it that may be its own.
    """

    times: dict[Cause, NotNegative]
    memory_factor: PositiveFloat
    time_factor: PositiveFloat
    exclude_after: Positive


class Policy(Retries):
    """What a job is told of it: what there is to raise."""

    mem_mib: Positive | None
    time_limit_min: Positive

    def memory_mib(self, failures: int, most_mib: int) -> int:
        """What a node is asked for after so many failures for want of it, if nodes have that; 0 where nothing is."""
        asked_mib = round((self.mem_mib or 0) * self.memory_factor**failures)
        return min(asked_mib, most_mib) if most_mib > 0 else asked_mib


class SlurmResources(Settings):
    """What one stage's job asks Slurm for. Nodes, tasks and GPUs follow from the stage's `trainer`.

    `mem_gib` is per node. `stop_before_s` seconds before the time limit the stage is asked to checkpoint.
    `max_requeues` is how often a job may start again; one that exceeds it fails.
    `members_per_job` is how many members of a sweep have their stages side by side in one job, each with these
    resources. Of one array at most `array_limit` tasks run at a time.
    """

    partition: SlurmValue | None
    account: SlurmValue | None
    qos: SlurmValue | None
    reservation: SlurmValue | None
    constraint: SlurmValue | None
    gpu_request: GpuRequest
    gpu_type: SlurmValue | None
    cpus_per_task: Positive
    mem_gib: PositiveFloat | None
    time_limit_min: Positive
    stop_before_s: Positive
    max_requeues: NotNegative
    members_per_job: Positive
    array_limit: Positive | None
    retries: Retries
    sbatch_arguments: list[Annotated[str, Field(pattern=r"^-")]]
    srun_arguments: list[Annotated[str, Field(pattern=r"^-")]]
    container_command: list[str]
    python: str | None
    modules: list[SlurmValue]
    setup_script: Path | None
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str]

    @property
    def policy(self) -> Policy:
        """What a job is told of what follows its failures."""
        mem_mib = None if self.mem_gib is None else round(self.mem_gib * 1024)
        return Policy(**dict(self.retries), mem_mib=mem_mib, time_limit_min=self.time_limit_min)

    @model_validator(mode="after")
    def _has_time_to_work(self) -> Self:
        if self.stop_before_s >= 60 * self.time_limit_min:
            raise ValueError(
                f"stop_before_s {self.stop_before_s} leaves nothing of time_limit_min {self.time_limit_min}; "
                f"use less than {60 * self.time_limit_min}"
            )
        return self

    @model_validator(mode="after")
    def _keeps_no_secret(self) -> Self:
        secret = [name for name in self.environment if SECRET_NAME.search(name)]
        if secret:
            raise ValueError(
                f"environment would write {', '.join(secret)} into a batch script; export it before `unclip submit`, "
                "whose environment the jobs inherit"
            )
        return self


class SlurmLaunch(SlurmResources, LaunchSettings):
    """Stages run as Slurm jobs. `stages` holds what differs for single stages, by their name or their kind.

    `max_parallel` is how many jobs of one run or sweep may run at a time; null leaves that to Slurm.
    """

    max_parallel: Positive | None
    stages: dict[str, dict[str, Any]]

    def key_of(self, resource: str, stage: str, kind: str) -> str:
        """Where the value of a stage's resource stands, such as `launch.time_limit_min`."""
        own = next((name for name in (stage, kind) if resource in self.stages.get(name, {})), None)
        return f"launch.{resource}" if own is None else f"launch.stages.{own}.{resource}"

    def resources_of(self, stage: str, kind: str) -> SlurmResources:
        """The resources of one stage: the profile's, then its kind's, then its own."""
        common = {name: getattr(self, name) for name in SlurmResources.model_fields}
        own = {**self.stages.get(kind, {}), **self.stages.get(stage, {})}
        return validate(SlurmResources, {**common, **own}, f"launch.stages.{stage if stage in self.stages else kind}")
