"""The jobs that were submitted for a stage: `work/<stage>/<fingerprint>/jobs/<number>.json`, one file each."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from uuid import uuid4

from pydantic import Field, TypeAdapter

from pipeline.config import Settings
from pipeline.errors import UserError
from pipeline.launch.slurm import commands
from pipeline.launch.slurm.commands import JobId, QueuedJob
from pipeline.workflow.causes import Cause, End, write_end
from pipeline.workflow.sealed import read_or_none, write_json_atomically

JOBS = "jobs"
_MOST_RESTARTS_OF_A_HELD_JOB = 10
"""Who wants more than that has to look why."""


class JobRecord(Settings):
    """One submission. `token` is the job's comment in Slurm; `job_id` is None until Slurm has answered.

    `group` is the run or sweep that submitted it, `wanted_by` are the runs that count on it. `lane` is its lane in a
    sweep with `launch.max_parallel`: the jobs of a lane run one after the other. `task` is its number in an array, and
    `beside` are the fingerprints of the stages that share its job, its own among them.
    """

    number: int
    token: str
    name: str
    group: str
    wanted_by: list[str]
    submitted_at: str
    lane: int | None = None
    job_id: Annotated[JobId, Field(coerce_numbers_to_str=True)] | None = None  # a number in older records
    task: int | None = None
    beside: list[str] = Field(default_factory=list)


_RECORD = TypeAdapter(JobRecord)


@dataclass(frozen=True)
class KnownJob:
    """A record together with what the queue says of its job; None where the queue does not know it any more.

    `is_left_out`: the job goes on, for others, without this stage, which has failed or was cancelled.
    """

    record: JobRecord
    queued: QueuedJob | None
    is_left_out: bool = False

    @property
    def job_id(self) -> JobId:
        """The id of a job that the queue knows."""
        assert self.queued is not None, "only a job that the queue knows has an id that counts"
        return self.queued.job_id

    @property
    def is_waiting(self) -> bool:
        """Whether the job has not started, and may."""
        return self.is_active and self.queued is not None and self.queued.state == "PENDING"

    @property
    def is_active(self) -> bool:
        """Whether the job may still make the stage."""
        return self.queued is not None and self.queued.is_active and not self.is_left_out


def new_token() -> str:
    """A comment that tells one submission from all others."""
    return f"unclip-{uuid4().hex}"


def write_record(work: Path, record: JobRecord, *, is_flushed: bool = True) -> None:
    """Write a record, in place of the one of the same number."""
    (work / JOBS).mkdir(parents=True, exist_ok=True)
    write_json_atomically(_path_of(work, record), record.model_dump(mode="json"), is_flushed=is_flushed)


def remove_record(work: Path, record: JobRecord) -> None:
    """Take back the record of a job that Slurm has refused."""
    _path_of(work, record).unlink()


def _path_of(work: Path, record: JobRecord) -> Path:
    return work / JOBS / f"{record.number:04}.json"


def mark_left_out(work: Path, job_id: JobId) -> Path:
    """The file that tells a job of several stages to leave this one out, whose script looks for it and makes it too."""
    return work / JOBS / f"without-{job_id.partition('_')[0]}"


def latest_record(work: Path) -> JobRecord | None:
    """The last submission of the stage with that work directory whose record is whole, or None."""
    paths = sorted((work / JOBS).glob("[0-9]*.json"), reverse=True)
    found = (read_or_none(_RECORD, path, "the submission before it counts") for path in paths)
    return next((record for record in found if record is not None), None)


def look_up(works: Iterable[Path]) -> dict[Path, KnownJob]:
    """The latest job of each stage that has one, as the queue has it now. Two questions to Slurm at most."""
    records = {work: record for work in works if (record := latest_record(work)) is not None}
    queue = commands.queued(record.job_id for record in records.values() if record.job_id is not None)
    # A submission that was killed before it had Slurm's answer may have a job all the same.
    unanswered = {record.token for record in records.values() if record.job_id is None}
    mine = commands.squeue("--me") if unanswered else []
    by_token = {(job.comment, job.job_id.partition("_")[2]): job for job in mine}
    return {work: _known(work, record, queue, by_token) for work, record in records.items()}


def release_held(known: Mapping[Path, KnownJob]) -> None:
    """Let jobs that Slurm holds after a launch that failed start again, and count that among their starts.

    Where the node was at fault Slurm has taken it out, so that they start elsewhere.
    """
    for work, each in known.items():
        job = each.queued
        if job is not None and job.is_held_by_slurm and job.restarts <= _MOST_RESTARTS_OF_A_HELD_JOB:
            with suppress(UserError):  # another one's job, or one that is gone by now
                commands.release(job.job_id)
                write_end(work, End(str(job.number), job.restarts - 1, "", Cause.LAUNCH, job.reason, "released"))


def _known(
    work: Path, record: JobRecord, queue: dict[JobId, QueuedJob], by_token: dict[tuple[str, str], QueuedJob]
) -> KnownJob:
    if record.job_id is None:
        found = by_token.get((record.token, "" if record.task is None else str(record.task)))
        record = record if found is None else record.model_copy(update={"job_id": found.job_id})
    else:
        found = queue.get(record.job_id)
        found = found if found is not None and _is_of(found, record) else None
    is_shared = bool(record.beside) and record.job_id is not None
    return KnownJob(record, found, is_shared and mark_left_out(work, record.job_id or "").exists())


def _is_of(job: QueuedJob, record: JobRecord) -> bool:
    """Ids begin anew when a cluster is rebuilt. Where a site takes comments away, the name has to do."""
    return job.comment == record.token or (job.comment in ("", "(null)") and job.name == record.name)
