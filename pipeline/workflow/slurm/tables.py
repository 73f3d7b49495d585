"""What jobs there will be and are, as tables, and the batch scripts to read."""

import shlex
from collections.abc import Mapping, Sequence

from rich.table import Table

from pipeline.workflow.slurm.commands import SUBMIT
from pipeline.workflow.slurm.submit import PlannedJob, StageKey, SubmittedStage
from pipeline.workflow.summary import new_table

_LONGEST_LIST = 4


def planned_jobs_table(jobs: Sequence[PlannedJob]) -> Table:
    """The dry run: which jobs, what they wait for, what they ask for."""
    shown = new_table("jobs", "stage", "member", "after", "nodes x tasks", "time limit", "resources")
    names = _names(jobs)
    for job in jobs:
        tasks = job.stage.tasks
        shown.add_row(
            names[job.key],
            _listed(job.members),
            _listed([names[key] for key in job.needs]),
            f"{tasks.nodes} x {tasks.per_node}",
            f"{job.resources.time_limit_min} min",
            _resources(job),
        )
    return shown


def submitted_table(stages: Sequence[SubmittedStage]) -> Table:
    """What became of each stage."""
    shown = new_table("jobs", "stage", "member", "job", "state", "after")
    names = _names([each.job for each in stages])
    for each in stages:
        shown.add_row(
            names[each.job.key],
            _listed(each.job.members),
            "" if each.job_id is None else str(each.job_id),
            each.submission.value,
            _listed(list(map(str, each.after))),
        )
    return shown


def scripts_text(jobs: Sequence[PlannedJob]) -> str:
    """Each job's sbatch command, and each batch script once."""
    scripts: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        scripts.setdefault(job.batch.script, []).append(job)
    parts = []
    for script, sharing in scripts.items():
        for job in sharing:
            command = [SUBMIT, *job.batch.options, "SCRIPT", *job.batch.arguments]
            parts.append(f"# {job.batch.name}\n{shlex.join(command)}\n")
        parts.append(f"# SCRIPT of {_listed([job.batch.name for job in sharing])}\n{script}")
    return "\n".join(parts)


def _resources(job: PlannedJob) -> str:
    shown = ("partition", "account", "qos", "constraint", "gres", "gpus-per-node", "cpus-per-task", "mem")
    asked = dict(option.removeprefix("--").split("=", 1) for option in job.batch.options if "=" in option)
    return ", ".join(f"{name} {asked[name]}" for name in shown if name in asked)


def _names(jobs: Sequence[PlannedJob]) -> Mapping[StageKey, str]:
    """A stage's name alone where it stands for one job, else with its fingerprint."""
    names = [job.key[0] for job in jobs]
    return {job.key: job.key[0] if names.count(job.key[0]) == 1 else job.batch.name for job in jobs}


def _listed(values: Sequence[str]) -> str:
    more = f" +{len(values) - _LONGEST_LIST}" if len(values) > _LONGEST_LIST else ""
    return f"{', '.join(values[:_LONGEST_LIST])}{more}"
