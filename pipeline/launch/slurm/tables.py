"""What jobs there will be and are, as tables, and the batch scripts to read."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from pipeline.launch.slurm.batch import BatchJob
from pipeline.launch.slurm.commands import SUBMIT, JobId
from pipeline.launch.slurm.groups import Group, PlannedJob
from pipeline.launch.slurm.status import JobStatus
from pipeline.launch.slurm.submit import Submission, SubmittedStage
from pipeline.terminal.tables import new_table
from pipeline.terminal.words import listed, members_shown
from pipeline.workflow.frozen import StageKey

_SHOWN = ("array", "partition", "account", "qos", "constraint", "gres", "gpus-per-node", "cpus-per-task", "mem")
_TABLE = Path("STAGES")
"""Where submitting writes what the tasks of an array are."""


def planned_jobs_table(groups: Sequence[Group]) -> Table:
    """The dry run: which jobs, what they wait for, what they ask for; an array is one row."""
    shown = new_table("jobs", "stage", "member", "after", "nodes x tasks", "time limit", "resources")
    jobs = [job for group in groups for job in group.jobs]
    names = _names(jobs)
    for group in groups:
        first, batch = group.jobs[0], group.batch(_TABLE)
        asked = _asked(batch)
        is_one = len(group.jobs) == 1
        shown.add_row(
            names[first.key] if is_one else first.key[0],
            members_shown(_members(group.jobs)),
            listed(dict.fromkeys(names[key] if is_one else key[0] for job in group.jobs for key in job.needs)),
            f"{asked['nodes']} x {asked['ntasks-per-node']}",
            f"{first.resources.time_limit_min} min",
            ", ".join(f"{name} {asked[name]}" for name in _SHOWN if name in asked),
        )
    return shown


def submitted_table(stages: Sequence[SubmittedStage]) -> Table:
    """What became of each stage; those of an array are one row."""
    shown = new_table("jobs", "stage", "member", "job", "state", "after")
    names = _names([each.job for each in stages])
    rows: dict[tuple[str, str, Submission], list[SubmittedStage]] = {}
    for each in stages:
        name = each.job.key[0] if _is_task(each.job_id) else names[each.job.key]
        rows.setdefault((name, _number(each.job_id), each.submission), []).append(each)
    for (name, number, submission), alike in rows.items():
        number_of = _number if len(alike) > 1 else str
        shown.add_row(
            name,
            members_shown(_members([each.job for each in alike])),
            number,
            submission.value,
            listed(dict.fromkeys(number_of(job_id) for each in alike for job_id in each.after)),
        )
    return shown


def jobs_table(title: str, statuses: Sequence[JobStatus]) -> Table:
    """The statuses as a table; the column of members only for a sweep."""
    is_sweep = len({member for status in statuses for member in status.members}) > 1
    member = ["member"] if is_sweep else []
    table = new_table(title, "stage", *member, "state", "job", "starts", "reason", "progress")
    rows: dict[tuple[str, ...], list[str]] = {}
    for status in statuses:
        progress = " · ".join(filter(None, [status.detail, status.until_limit and f"limit in {status.until_limit}"]))
        # Of tasks of an array that stand alike one row is enough.
        row = (status.stage, status.state, _number(status.job_id), str(status.starts or ""), status.reason, progress)
        rows.setdefault(row, []).extend(status.members)
    for (stage, *others), members in rows.items():
        table.add_row(stage, *([members_shown(members)] if is_sweep else []), *others)
    return table


def scripts_text(groups: Sequence[Group]) -> str:
    """The sbatch command of the first job or array of each stage, and each batch script once."""
    scripts: dict[str, list[Group]] = {}
    for group in groups:
        scripts.setdefault(group.jobs[0].batch.script, []).append(group)
    parts = ["# SCRIPT, STAGES and JOB_OF_... stand for what is known once `unclip submit` has asked Slurm\n"]
    for script, sharing in scripts.items():
        firsts = {group.jobs[0].stage.stage: group for group in reversed(sharing)}
        for name, group in reversed(firsts.items()):
            others = sum(each.jobs[0].stage.stage == name for each in sharing) - 1
            batch = group.batch(_TABLE)
            dependency = [f"--dependency={','.join(group.dependencies)}"] if group.dependencies else []
            command = [SUBMIT, *batch.options, *dependency, "SCRIPT", *batch.arguments]
            parts.append(f"# {batch.name}{f', and {others} like it' if others else ''}\n{shlex.join(command)}\n")
        parts.append(f"# SCRIPT of {listed(list(reversed(firsts)))}\n{script}")
    return "\n".join(parts)


def _members(jobs: Iterable[PlannedJob]) -> list[str]:
    return list(dict.fromkeys(member for job in jobs for member in job.members))


def _is_task(job_id: JobId | None) -> bool:
    return "_" in (job_id or "")


def _number(job_id: JobId | None) -> str:
    """Of a task that of its array."""
    return (job_id or "").partition("_")[0]


def _asked(batch: BatchJob) -> dict[str, str]:
    return dict(option.removeprefix("--").split("=", 1) for option in batch.asked if "=" in option)


def _names(jobs: Sequence[PlannedJob]) -> Mapping[StageKey, str]:
    """A stage's name alone where it stands for one job, else with its fingerprint."""
    jobs_of = Counter(job.key[0] for job in jobs)
    return {job.key: job.key[0] if jobs_of[job.key[0]] == 1 else job.batch.name for job in jobs}
