"""What jobs there will be and are, as tables, and the batch scripts to read."""

import shlex
from collections.abc import Mapping, Sequence

from rich.table import Table

from pipeline.launch.slurm.commands import SUBMIT
from pipeline.launch.slurm.status import JobStatus
from pipeline.launch.slurm.submit import PlannedJob, SubmittedStage
from pipeline.terminal.tables import new_table
from pipeline.workflow.frozen import StageKey

_LONGEST_LIST = 4


def planned_jobs_table(jobs: Sequence[PlannedJob]) -> Table:
    """The dry run: which jobs, what they wait for, what they ask for."""
    shown = new_table("jobs", "stage", "member", "after", "nodes x tasks", "time limit", "resources")
    names = _names(jobs)
    for job in jobs:
        tasks = job.stage.tasks
        shown.add_row(
            names[job.key],
            members_shown(job.members),
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
            members_shown(each.job.members),
            "" if each.job_id is None else str(each.job_id),
            each.submission.value,
            _listed(list(map(str, each.after))),
        )
    return shown


def jobs_table(title: str, statuses: Sequence[JobStatus]) -> Table:
    """The statuses as a table; the column of members only for a sweep."""
    is_sweep = len({member for status in statuses for member in status.members}) > 1
    member = ["member"] if is_sweep else []
    table = new_table(title, "stage", *member, "state", "job", "starts", "reason", "progress")
    for status in statuses:
        table.add_row(
            status.stage,
            *([members_shown(status.members)] if is_sweep else []),
            status.state,
            "" if status.job_id is None else str(status.job_id),
            str(status.starts or ""),
            status.reason,
            " · ".join(filter(None, [status.detail, status.until_limit and f"limit in {status.until_limit}"])),
        )
    return table


def scripts_text(jobs: Sequence[PlannedJob]) -> str:
    """The sbatch command of the first job of each stage, and each batch script once."""
    scripts: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        scripts.setdefault(job.batch.script, []).append(job)
    names = _names(jobs)
    parts = []
    for script, sharing in scripts.items():
        firsts = {job.stage.stage: job for job in reversed(sharing)}
        for name, job in reversed(firsts.items()):
            others = sum(each.stage.stage == name for each in sharing) - 1
            after = ":".join(f"JOB_OF_{names[key]}" for key in job.needs)
            dependency = [f"--dependency=afterok:{after}"] if after else []
            command = [SUBMIT, *job.batch.options, *dependency, "SCRIPT", *job.batch.arguments]
            parts.append(f"# {job.batch.name}{f', and {others} like it' if others else ''}\n{shlex.join(command)}\n")
        parts.append(f"# SCRIPT of {_listed(list(reversed(firsts)))}\n{script}")
    return "\n".join(parts)


def members_shown(members: Sequence[str]) -> str:
    """The members of a sweep by their numbers, `0-5, 7`; a run by its name."""
    numbers = [name.rpartition(".")[2] for name in members]
    if not all(number.isdigit() for number in numbers):
        return _listed(members)
    ranges: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return _listed([str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges])


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
