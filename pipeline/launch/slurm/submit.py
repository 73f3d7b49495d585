"""From plans to jobs: each stage that is not finished once, `afterok` on exactly what it needs."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.config import RunConfig, validate
from pipeline.errors import UserError
from pipeline.launch.identity import this_process
from pipeline.launch.launcher import LauncherUnavailableError
from pipeline.launch.slurm import commands
from pipeline.launch.slurm.commands import JobId
from pipeline.launch.slurm.groups import Group, PlannedJob, groups, rounds
from pipeline.launch.slurm.jobs import (
    JobRecord,
    KnownJob,
    look_up,
    mark_left_out,
    new_token,
    release_held,
    remove_record,
    write_record,
)
from pipeline.launch.slurm.lanes import Lanes
from pipeline.launch.slurm.settings import SlurmLaunch
from pipeline.workflow.declaration import resolve
from pipeline.workflow.frozen import StageKey, write_frozen
from pipeline.workflow.ownership import acquire
from pipeline.workflow.plan import Action, Plan, PlannedStage

SUBMITTING = "submitting"
_LEASE_S = 60.0
_SECONDS_FOR_AN_ENDING_JOB = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0
_NO_ANSWER = re.compile("timed out|unable to contact", re.IGNORECASE)
"""Where sbatch says this, there may be a job all the same."""


class Submission(StrEnum):
    """What became of a stage."""

    SUBMITTED = "submitted"
    QUEUED = "queued already"
    FINISHED = "finished"


@dataclass(frozen=True)
class SubmittedStage:
    """A stage, its job (None where it is finished) and the jobs that this one waits for."""

    job: PlannedJob
    submission: Submission
    job_id: JobId | None = None
    after: tuple[JobId, ...] = ()


def slurm_launch(config: RunConfig) -> SlurmLaunch:
    """The config's cluster profile."""
    return validate(SlurmLaunch, config.launch, "launch")


def plan_jobs(plans: Sequence[Plan]) -> list[PlannedJob]:
    """The jobs of these runs, each stage once, in an order in which every job follows those it needs.

    Raises `UserError` for a key of `launch.stages` that names no stage, and for resources that do not fit.
    """
    wanted_by: dict[StageKey, list[str]] = {}
    for plan in plans:
        for key in map(_key, _to_do(plan)):
            wanted_by.setdefault(key, []).append(plan.config.run.name)
    jobs: dict[StageKey, PlannedJob] = {}
    for place, plan in enumerate(plans):
        launch = slurm_launch(plan.config)
        _check_stage_names(launch, plan)
        for stage in _to_do(plan):
            if _key(stage) in jobs:
                continue
            frozen = stage.frozen
            assert frozen is not None, "a plan with blocked stages has no jobs"
            resources = launch.resources_of(stage.name, stage.kind)
            needs = dict.fromkeys(key for key in frozen.needs if key in wanted_by)
            members = tuple(wanted_by[_key(stage)])
            jobs[_key(stage)] = PlannedJob(
                frozen, frozen.group, members, resources, tuple(needs), place,
                launch.key_of("time_limit_min", stage.name, stage.kind),
            )  # fmt: skip
    return list(jobs.values())


def submit_jobs(
    jobs: Sequence[PlannedJob], outputs: Path, max_parallel: int | None, note: Callable[[str], None]
) -> list[SubmittedStage]:
    """Give Slurm every job that neither is finished nor in the queue already, by whichever run.

    One submission at a time works on one `outputs`, so that two at the same moment share what they have in common.
    Raises `UserError` with Slurm's words where it refuses a job; what was submitted before that stays.
    """
    _check_time_limits(jobs)
    done: dict[StageKey, SubmittedStage] = {}
    with one_submission_at_a_time(outputs):
        known = _settled(jobs, note)
        release_held(known)
        lanes = Lanes(max_parallel)
        for job in jobs:
            before = known.get(job.stage.work)
            if before is not None and before.is_active and before.record.group == job.group:
                lanes.occupy(before.record.lane, before.job_id)
        in_rounds = list(rounds(jobs))
        # What runs at most so many at a time has no arrays: their tasks come one by one into the lanes.
        has_arrays = max_parallel is None and any(len(alike) > 1 for alike in in_rounds)
        max_tasks = commands.max_array_size() if has_arrays else 1
        for alike in in_rounds:
            anew = _without_those_there(alike, known, done)
            for group in groups(anew, lambda key: done[key].job_id, max_tasks):
                _submit(group, known, done, lanes)
    return [done[job.key] for job in jobs]


def _without_those_there(
    jobs: Sequence[PlannedJob], known: Mapping[Path, KnownJob], done: dict[StageKey, SubmittedStage]
) -> list[PlannedJob]:
    """Those that are to be submitted; the others are `done`."""
    anew, in_vain = [], []
    for job in jobs:
        before = known.get(job.stage.work)
        is_new_before = any(done[key].submission is Submission.SUBMITTED for key in job.needs)
        if job.stage.store.find(*job.key) is not None:
            done[job.key] = SubmittedStage(job, Submission.FINISHED)
        elif before is None or not before.is_active:
            anew.append(job)
        elif before.is_waiting and is_new_before:
            # It waits for a job that has failed or is gone; Slurm has not seen that yet, or never will.
            anew.append(job)
            if before.record.beside:
                mark_left_out(job.stage.work, before.job_id).touch()
            else:
                in_vain.append(before.job_id)
        else:
            wanted_by = list(dict.fromkeys([*before.record.wanted_by, *job.members]))
            record = before.record.model_copy(update={"wanted_by": wanted_by})
            write_record(job.stage.work, record, is_flushed=len(jobs) == 1)
            done[job.key] = SubmittedStage(job, Submission.QUEUED, before.job_id, _after(job, done))
    commands.cancel(in_vain)
    return anew


def _submit(group: Group, known: Mapping[Path, KnownJob], done: dict[StageKey, SubmittedStage], lanes: Lanes) -> None:
    first = group.jobs[0]
    minutes, after, dependencies = first.resources.time_limit_min, _after(first, done), group.dependencies
    lane = lanes.choose(after, minutes)
    if lane is not None and (waits_for := lanes.jobs_of(lane)):
        dependencies.append(f"afterany:{_joined(waits_for)}")
    token, is_one = new_token(), len(group.jobs) == 1
    table = first.stage.store.outputs / SUBMITTING / f"{token}.stages"
    batch = group.batch(table)
    records: dict[StageKey, JobRecord] = {}
    for task, job in group.items():
        before = known.get(job.stage.work)
        wanted_before = before.record.wanted_by if before is not None and before.is_waiting else []
        records[job.key] = JobRecord(
            number=1 if before is None else before.record.number + 1,
            token=token,
            name=batch.name,
            group=job.group,
            wanted_by=list(dict.fromkeys([*wanted_before, *job.members])),
            submitted_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            lane=lane,
            task=task if group.is_array else None,
            beside=[each.stage.fingerprint for each in group.tasks[task]] if len(group.tasks[task]) > 1 else [],
        )
        write_frozen(job.stage, is_flushed=is_one)
        # Written before Slurm is asked, too: a submission that is killed in between finds its job again by the token.
        write_record(job.stage.work, records[job.key], is_flushed=is_one)
    if not is_one:
        table.write_bytes(group.table)
        os.sync()  # thousands of files in one go
    options = [*batch.options, f"--comment={token}"]
    if dependencies:
        options.append(f"--dependency={','.join(dependencies)}")
    try:
        number = commands.submit(_write_script(first), batch.arguments, options)
    except UserError as error:
        is_answer = not isinstance(error, LauncherUnavailableError) and _NO_ANSWER.search(str(error)) is None
        if is_answer:  # what stood before it counts again
            for job in group.jobs:
                remove_record(job.stage.work, records[job.key])
        submitted = sum(each.submission is Submission.SUBMITTED for each in done.values())
        kept = f"; jobs before it: {submitted} submitted, and the same command goes on from them"
        raise type(error)(f"stage {first.key[0]}: {error}{kept if submitted else ''}") from error
    for task, job in group.items():
        job_id = group.id_of(task, number)
        write_record(job.stage.work, records[job.key].model_copy(update={"job_id": job_id}), is_flushed=is_one)
        done[job.key] = SubmittedStage(job, Submission.SUBMITTED, job_id, _after(job, done))
    lanes.add(lane, number, after, minutes)


def _after(job: PlannedJob, done: Mapping[StageKey, SubmittedStage]) -> tuple[JobId, ...]:
    return tuple(job_id for key in job.needs if (job_id := done[key].job_id) is not None)


def _settled(jobs: Sequence[PlannedJob], note: Callable[[str], None]) -> dict[Path, KnownJob]:
    """The queue's word on every stage, once no job is in between an end and another start."""
    works = [job.stage.work for job in jobs]
    deadline = time.monotonic() + _SECONDS_FOR_AN_ENDING_JOB
    has_said = False
    while True:
        known = look_up(works)
        ending = [each.job_id for each in known.values() if each.queued is not None and each.queued.is_ending]
        if not ending or time.monotonic() > deadline:
            return known
        if not has_said:
            note(f"waiting for {len(ending)} jobs to end ({_joined(ending[:3], ', ')})")
            has_said = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextmanager
def one_submission_at_a_time(outputs: Path) -> Iterator[None]:
    """Wait until no other process submits or cancels jobs of this `outputs`."""
    place = outputs / SUBMITTING
    place.mkdir(parents=True, exist_ok=True)
    ownership = acquire(place, _LEASE_S, threading.Event(), this_process().job)
    try:
        yield
    finally:
        ownership.release()
        ownership.forget_earlier()


def _write_script(job: PlannedJob) -> Path:
    """The batch script, in a file named by its contents; jobs of the same resources share it."""
    digest = hashlib.sha256(job.batch.script.encode()).hexdigest()[:12]
    path = job.stage.store.outputs / SUBMITTING / f"{digest}.sbatch"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(job.batch.script, encoding="utf-8")
        temporary.replace(path)
    return path


def _to_do(plan: Plan) -> list[PlannedStage]:
    return [stage for stage in plan.stages if stage.action is not Action.REUSE]


def _key(stage: PlannedStage) -> StageKey:
    assert stage.fingerprint is not None, "a plan with blocked stages has no jobs"
    return stage.name, stage.fingerprint


def _check_stage_names(launch: SlurmLaunch, plan: Plan) -> None:
    valid = {stage.name for stage in plan.stages} | set(resolve(plan.config.catalog).stages)
    unknown = sorted(set(launch.stages) - valid)
    if unknown:
        raise UserError(
            f"launch.stages.{unknown[0]} names no stage and no kind of stage; valid here: {', '.join(sorted(valid))}"
        )


def _check_time_limits(jobs: Sequence[PlannedJob]) -> None:
    """Refuse what Slurm would queue and never start: more time than the partition gives anybody."""
    try:
        limits = commands.time_limits_min()
    except UserError:  # a site may keep that to itself; what it is about is submitted all the same
        return
    for job in jobs:
        asked, partitions = job.resources.time_limit_min, (job.resources.partition or "").split(",")
        known = [limits[name] for name in partitions if name in limits]
        longest = max((limit or asked for limit in known), default=asked)
        if asked > longest:
            raise UserError(
                f"{job.time_limit_key}={asked} of stage {job.stage.stage} is more than partition "
                f"{job.resources.partition or 'of default'} allows (MaxTime is {longest} min); use "
                f"{job.time_limit_key}={longest} or less: a stage goes on in another start"
            )


def _joined(job_ids: Sequence[JobId], separator: str = ":") -> str:
    return separator.join(job_ids)
