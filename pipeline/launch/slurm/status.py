"""Where submitted runs stand, and taking them back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.slurm import commands
from pipeline.launch.slurm.commands import JobId, QueuedJob
from pipeline.launch.slurm.jobs import (
    JOBS,
    KnownJob,
    latest_record,
    look_up,
    mark_left_out,
    release_held,
    write_record,
)
from pipeline.launch.slurm.submit import one_submission_at_a_time
from pipeline.terminal.tables import DAMAGED, WAITING, stage_state
from pipeline.terminal.words import progress_line
from pipeline.workflow.artifacts import MANIFEST, ArtifactStore
from pipeline.workflow.causes import Cause, last_words
from pipeline.workflow.ownership import ATTEMPTS, latest_attempt
from pipeline.workflow.progress import latest_checkpoint_samples, read_failure, read_progress
from pipeline.workflow.runs import RunRecord, RunStage, stages_with_members, store_of

_RUNNING = "RUNNING"
_NOT_SUBMITTED = "not submitted"


@dataclass(frozen=True)
class JobStatus:
    """One stage of a submitted run. Words in capitals are Slurm's own, in small letters ours."""

    stage: str
    fingerprint: str
    members: tuple[str, ...]
    state: str
    job_id: JobId | None
    reason: str
    starts: int
    detail: str
    until_limit: str


def are_for_slurm(outputs: Path, records: Sequence[RunRecord]) -> bool:
    """Whether a stage of these runs was submitted to Slurm, or was to be."""
    store = ArtifactStore(outputs)
    return any(record.config.get("launch", {}).get("kind") == "slurm" for record in records) or any(
        latest_record(store.work(stage.name, stage.fingerprint)) for record in records for stage in record.stages
    )


def job_statuses(outputs: Path, records: Sequence[RunRecord]) -> list[JobStatus]:
    """Every stage of these runs, once. Asks `squeue`, and `sacct` for what the queue has forgotten.

    Raises `LauncherUnavailableError` where there is no Slurm.
    """
    store = store_of(outputs, records)
    stages = stages_with_members(records)
    works = [store.work(stage.name, stage.fingerprint) for stage, _ in stages]
    known = look_up(works)
    release_held(known)
    forgotten = [
        each.record.job_id for each in known.values() if each.queued is None and each.record.job_id is not None
    ]
    accounted = commands.accounted(forgotten)
    return [
        _status(store, stage, members, known.get(work), accounted)
        for (stage, members), work in zip(stages, works, strict=True)
    ]


def active_jobs(outputs: Path, works: Sequence[Path]) -> dict[Path, str]:
    """What is to be said of the jobs of these work directories that may still make their stage.

    Where Slurm gives no answer, every job counts whose stage is not finished.
    """
    submitted = [work for work in works if (work / JOBS).is_dir()]
    try:
        known = look_up(submitted)
    except UserError as error:
        place = ArtifactStore(outputs).path
        unfinished = [work for work in submitted if not (place(work.parent.name, work.name) / MANIFEST).exists()]
        return dict.fromkeys(unfinished, f"of its job Slurm cannot be asked ({error})")
    active = {work: each for work, each in known.items() if each.is_active}
    return {work: f"job {each.job_id} is {each.queued.state}" for work, each in active.items() if each.queued}


@dataclass(frozen=True)
class Cancellation:
    """The jobs that were cancelled, and those that other runs count on: (stage, job id, runs)."""

    cancelled: tuple[tuple[str, JobId], ...]
    kept: tuple[tuple[str, JobId, tuple[str, ...]], ...]


def cancel_runs(outputs: Path, records: Sequence[RunRecord]) -> Cancellation:
    """Take these runs' wish for their jobs back, and cancel those that no other run counts on.

    A job that members share goes on without the stage that is cancelled, as long as it has another one to make.
    """
    store = ArtifactStore(outputs)
    names = {record.name for record in records}
    cancelled: dict[Path, tuple[str, JobId]] = {}
    kept: list[tuple[str, JobId, tuple[str, ...]]] = []
    with one_submission_at_a_time(outputs):
        works = {store.work(stage.name, stage.fingerprint): stage.name for stage, _ in stages_with_members(records)}
        for work, known in look_up(works).items():
            if not known.is_active or store.find(works[work], work.name) is not None:
                continue
            others = [name for name in known.record.wanted_by if name not in names]
            write_record(work, known.record.model_copy(update={"wanted_by": others}), is_flushed=False)
            if others:
                kept.append((works[work], known.job_id, tuple(others)))
            else:
                cancelled[work] = (works[work], known.job_id)
                if known.record.beside:
                    mark_left_out(work, known.job_id).touch()
        whole = [job_id for work, (_, job_id) in cancelled.items() if not _has_others(store, work, job_id)]
        commands.cancel(list(dict.fromkeys(whole)))
    return Cancellation(tuple(cancelled.values()), tuple(kept))


def _has_others(store: ArtifactStore, work: Path, job_id: JobId) -> bool:
    """Whether a job of several stages has one to make that was not left out."""
    record, stage = latest_record(work), work.parent.name
    beside = [store.work(stage, each) for each in (record.beside if record is not None else ())]
    return any(not mark_left_out(each, job_id).exists() and store.find(stage, each.name) is None for each in beside)


def _status(
    store: ArtifactStore,
    stage: RunStage,
    members: tuple[str, ...],
    known: KnownJob | None,
    accounted: Mapping[JobId, str],
) -> JobStatus:
    work = store.work(stage.name, stage.fingerprint)
    state, detail = stage_state(store, stage)
    if state == WAITING and known is None:
        state = _NOT_SUBMITTED
    reason = until_limit = ""
    record = None if known is None else known.record
    queued = None if known is None else known.queued
    is_settled = state == "finished" or (state == DAMAGED and (queued is None or not queued.is_active))
    if not is_settled and known is not None and known.is_left_out:
        state = state if known.record.wanted_by else "cancelled"
        reason, detail = _cause(work), _failure(work)
    elif not is_settled and queued is not None:
        state, reason = queued.state, queued.reason
        if queued.is_active:
            detail = _progress(work) if queued.state == _RUNNING else _kept(work)
            detail = " · ".join(filter(None, [detail, _of_earlier_starts(work, queued)]))
            until_limit = queued.time_left if queued.state == _RUNNING else ""
        else:
            reason, detail = _cause(work) or reason, _failure(work)
    elif not is_settled and record is not None and record.job_id is not None and record.job_id in accounted:
        state, reason, detail = accounted[record.job_id], _cause(work), _failure(work)
    return JobStatus(
        stage.name,
        stage.fingerprint,
        members,
        state,
        None if record is None else record.job_id,
        reason,
        latest_attempt(work / ATTEMPTS),
        detail,
        until_limit,
    )


def _progress(work: Path) -> str:
    progress = read_progress(work)
    return "starting" if progress is None or progress.is_silent else progress_line(progress)


def _of_earlier_starts(work: Path, job: QueuedJob) -> str:
    words = last_words(work, str(job.number))
    return "" if job.state == _RUNNING and words == Cause.STOPPED.words else words


def _kept(work: Path) -> str:
    samples_seen = latest_checkpoint_samples(work)
    return "" if samples_seen is None else f"checkpoint at {samples_seen:,} samples"


def _cause(work: Path) -> str:
    failure = read_failure(work)
    return "" if failure is None or failure.cause is Cause.UNKNOWN else failure.cause.words


def _failure(work: Path) -> str:
    failure = read_failure(work)
    return _kept(work) if failure is None else failure.message
