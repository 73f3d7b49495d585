"""The one door to Slurm: its commands, with argument lists that no shell reads."""

import os
import re
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.launcher import LauncherUnavailableError
from pipeline.terminal.words import ranges
from pipeline.workflow.sealed import warn

SUBMIT = "sbatch"
JobId = str
"""As Slurm takes it anywhere: `123`, and `123_4` for a task of an array."""
_TIMEOUT_S = 120.0
_PATIENT_S = 10.0
"""After which it is said what is waited for."""
_COMPLETING = "COMPLETING"
_OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_HELD_BY_SLURM = ("launch failed requeued held", "JobHoldMaxRequeue")
_NO_ACCOUNTING = "accounting storage is disabled"
_NEVER = "DependencyNeverSatisfied"
_FIELDS = {
    "JobID": 20,
    "JobArrayID": 30,
    "State": 20,
    "Reason": 80,
    "TimeLeft": 20,
    "RestartCnt": 10,
    "Name": 120,
    "Comment": 120,
}
"""What is asked of `squeue`, and how wide."""
_OWN_TO_A_JOB = ("SLURM_", "SRUN_", "MASTER_")
_OWN_TO_A_PROCESS = {"LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


@dataclass(frozen=True)
class QueuedJob:
    """A job as `squeue` has it: the state in Slurm's words, and its reason where it waits. Kept for some minutes after
    its end.

    `number` is the `SLURM_JOB_ID` of its processes, which a task of an array has for itself once it starts.
    """

    job_id: JobId
    number: int
    state: str
    reason: str
    time_left: str
    restarts: int
    name: str
    comment: str

    @property
    def is_ending(self) -> bool:
        """Whether it is on its way out, to an end or to another start; which of them is not yet known."""
        return self.state == _COMPLETING

    @property
    def is_held_by_slurm(self) -> bool:
        """Whether Slurm holds it after a start that failed, and will not try again by itself."""
        return self.state == "PENDING" and self.reason.replace("_", " ") in _HELD_BY_SLURM

    @property
    def is_active(self) -> bool:
        """Whether it may still bring something about."""
        return self.state not in _OVER and self.reason != _NEVER


def submit(script: Path, arguments: Sequence[str], options: Sequence[str]) -> JobId:
    """`sbatch`: the id of the new job. Raises `UserError` with Slurm's own words."""
    answer = _output(SUBMIT, "--parsable", *options, str(script), *arguments)
    return answer.strip().split(";")[0]


def queued(job_ids: Iterable[JobId]) -> dict[JobId, QueuedJob]:
    """Those of these jobs that the queue still knows."""
    wanted = set(job_ids)
    if not wanted:
        return {}
    # One unknown id alone is an error to squeue, among others it is passed over.
    try:
        found = squeue(f"--jobs={_listed(wanted)}")
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return {job.job_id: job for job in found if job.job_id in wanted}


def accounted(job_ids: Iterable[JobId]) -> dict[JobId, str]:
    """The state of these jobs in the accounting, in Slurm's words; empty where Slurm keeps none, or does not tell."""
    wanted = _listed(job_ids)
    if not wanted:
        return {}
    try:
        lines = _output("sacct", "-X", "-P", "-n", f"--jobs={wanted}", "--format=JobID,State").splitlines()
    except UserError as error:
        if _NO_ACCOUNTING not in str(error):
            warn(f"sacct tells nothing of jobs that have left the queue ({error}); their stages' own records do")
        return {}
    rows = [line.split("|") for line in lines]
    # A requeued job has a row for each of its starts; the last one counts.
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _listed(job_ids: Iterable[JobId]) -> str:
    """Those jobs for an option, of arrays the whole: a line of thousands of tasks would be too long."""
    return ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))


def cancel(job_ids: Sequence[JobId]) -> None:
    """`scancel`."""
    tasks: dict[JobId, list[int]] = {}
    for job_id in dict.fromkeys(job_ids):
        number, _, task = job_id.partition("_")
        tasks.setdefault(number, []).extend([int(task)] if task else [])
    if tasks:
        wanted = (f"{number}_[{','.join(ranges(found))}]" if found else number for number, found in tasks.items())
        _output("scancel", *wanted)


def release(job_id: JobId) -> None:
    """`scontrol release`: let a held job start."""
    _output("scontrol", "release", job_id)


def max_array_size() -> int:
    """How many tasks an array can have; 1 where it can have none."""
    shown = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(shown[1]) if shown else 1)


def squeue(*selection: str) -> list[QueuedJob]:
    """The jobs of a selection, such as `--me`, that the queue still knows; each task of an array is one."""
    asked = ",".join(f"{field}:{width}" for field, width in _FIELDS.items())
    return read_queue(_bytes_of("squeue", "--noheader", "--array", "--states=all", f"--Format={asked}", *selection))


def read_queue(text: bytes) -> list[QueuedJob]:
    """Jobs from what `squeue` has written. Only widths tell fields apart: names may hold line breaks, and all else."""
    size = sum(_FIELDS.values()) + 1
    jobs = []
    for start in range(0, len(text), size):
        fields, place = [], start
        for width in _FIELDS.values():
            fields.append(text[place : place + width].decode(errors="replace").strip())
            place += width
        number, job_id, state, reason, time_left, starts, name, comment = fields
        reason = "" if reason == "None" else reason
        jobs.append(QueuedJob(job_id, int(number), state, reason, time_left, int(starts), name, comment))
    return jobs


def time_limits_min() -> dict[str, int | None]:
    """The longest time limit of each partition, in minutes, or None; the default partition is there as "", too."""
    limits: dict[str, int | None] = {}
    for line in _output("sinfo", "--noheader", "--format=%R|%l|%P").splitlines():
        name, shown, marked = line.split("|")
        days, _, clock = shown.rpartition("-")
        parts = [int(part) for part in clock.split(":")] if clock[:1].isdigit() else []
        # minutes:seconds, or with hours before them
        minutes = 24 * 60 * int(days or 0) + sum(60**place * part for place, part in enumerate(reversed(parts[:-1])))
        limits[name] = minutes if parts else None
        if marked != name:
            limits[""] = limits[name]
    return limits


def _output(program: str, *arguments: str) -> str:
    return _bytes_of(program, *arguments).decode(errors="replace")


def _bytes_of(program: str, *arguments: str) -> bytes:
    is_slow = threading.Timer(_PATIENT_S, warn, [f"waiting for an answer of {program}, for {_TIMEOUT_S:.0f} s at most"])
    is_slow.daemon = True
    try:
        is_slow.start()
        done = subprocess.run(
            [program, *arguments], capture_output=True, check=False, timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL, env=environment_of_jobs(os.environ),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LauncherUnavailableError(
            f"{program} is not installed here; submit from a login node of the cluster, or try "
            "`python slurm/one_machine.py` (packages: slurmctld slurmd slurm-client munge)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LauncherUnavailableError(f"{program} gave no answer in {_TIMEOUT_S:.0f} s; try again") from error
    finally:
        is_slow.cancel()
    if done.returncode != 0:
        said = " ".join(line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip())
        raise UserError(f"{said or f'{program} failed with status {done.returncode}'}")
    return done.stdout


def environment_of_jobs(own: Mapping[str, str]) -> dict[str, str]:
    """What a job may inherit: not the marks of the job, step or rank that submits it."""
    return {
        name: value
        for name, value in own.items()
        if name == "SLURM_CONF" or not (name.startswith(_OWN_TO_A_JOB) or name in _OWN_TO_A_PROCESS)
    }
