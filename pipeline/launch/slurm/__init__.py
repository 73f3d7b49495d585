"""Stages as Slurm jobs: what they ask for, their dependencies, their records, and where they stand."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from pipeline.errors import typed
from pipeline.launch.identity import ProcessIdentity
from pipeline.launch.launcher import Launcher, StageOutcome
from pipeline.launch.slurm.groups import planned_groups
from pipeline.launch.slurm.identity import identity_in_job
from pipeline.launch.slurm.settings import SlurmLaunch
from pipeline.launch.slurm.status import active_jobs, are_for_slurm, cancel_runs, job_statuses
from pipeline.launch.slurm.submit import plan_jobs, slurm_launch, submit_jobs
from pipeline.launch.slurm.tables import jobs_table, planned_jobs_table, scripts_text, submitted_table
from pipeline.terminal.display import Display
from pipeline.workflow.plan import Plan
from pipeline.workflow.runs import RunRecord

_USUAL_ARRAY = 1001
"""Tasks of an array at most, where nobody has set anything else. Slurm itself is asked when something is submitted."""


class SlurmLauncher(Launcher):
    """Gives Slurm a job for each stage, and leaves them to it."""

    settings = SlurmLaunch
    waits = False

    def check(self, plans: Sequence[Plan]) -> None:
        """Refuse resources that fit nothing, and those of stages that are not there."""
        plan_jobs(plans)

    def preview(self, plans: Sequence[Plan]) -> Iterable[RenderableType]:
        """The jobs, and the batch scripts to read."""
        max_tasks = 1 if slurm_launch(plans[0].config).max_parallel is not None else _USUAL_ARRAY
        groups = list(planned_groups(plan_jobs(plans), max_tasks))
        return planned_jobs_table(groups), scripts_text(groups)

    def submit(self, plans: Sequence[Plan], display: Display) -> list[StageOutcome]:
        """Submit what neither is finished nor in the queue already; nothing is waited for."""
        config = plans[0].config
        name = config.run.group or config.run.name
        jobs = plan_jobs(plans)
        if not jobs:
            display.note(f"run {name}: every stage is finished")
            return []
        limit = slurm_launch(config).max_parallel
        display.show(submitted_table(submit_jobs(jobs, plans[0].store.outputs, limit, display.note)))
        display.note(typed(plans[0].store.outputs, "status", name))
        return []

    def state(self, outputs: Path, records: Sequence[RunRecord], title: str) -> Table | None:
        """The jobs as the queue has them."""
        return jobs_table(title, job_statuses(outputs, records)) if are_for_slurm(outputs, records) else None

    def cancel(self, outputs: Path, records: Sequence[RunRecord]) -> list[str]:
        """`scancel`, for the jobs that no other run counts on."""
        result = cancel_runs(outputs, records)
        return [
            *(f"cancelled {stage}, job {job_id}" for stage, job_id in result.cancelled),
            *(f"left {stage}, job {job_id}: {', '.join(runs[:3])} counts on it" for stage, job_id, runs in result.kept),
        ]

    def at_work(self, outputs: Path, works: Sequence[Path]) -> dict[Path, str]:
        """Those whose job may still make the stage."""
        return active_jobs(outputs, works)

    def identity(self, environment: Mapping[str, str]) -> ProcessIdentity:
        """One of the tasks of a job."""
        return identity_in_job(environment)


LAUNCHER = SlurmLauncher()
