"""How far a stage in progress is, in small files of its work directory that any process can read."""

import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.workflow.causes import Cause
from pipeline.workflow.sealed import DamagedRecordError, read_json, read_or_none, warn, write_json_atomically

PROGRESS = "progress.json"
FAILURE = "failure.json"
HARDWARE = "hardware.json"
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
"""What a stage goes on from, and needs no more once it is finished."""
CHECKPOINT_SUFFIX = ".ckpt"
COMPILER_CACHE = "compiler"
"""The compiler's own cache, below `paths.outputs`."""
SECONDS_UNTIL_SILENT = 60.0
EXIT_INTERRUPTED = 75
"""The exit status of what was stopped on request and can be resumed."""


class Phase(StrEnum):
    """What a stage's process is at."""

    STARTING = "starting"
    WORKING = "working"
    PUBLISHING = "publishing"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class Outcome(StrEnum):
    """How an attempt at a stage ended."""

    FINISHED = "finished"
    REUSED = "reused"
    FAILED = "failed"
    SKIPPED = "skipped"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Progress:
    """The one counter, `samples_seen`, and what follows from it. Times are seconds since the epoch.

    `devices` is how many this start works on, and `earlier_device_s` what earlier starts cost, work that was lost too.
    """

    phase: Phase
    samples_seen: int = 0
    max_samples: int = 0
    samples_per_s: float = 0.0
    loss: float | None = None
    activity: str = ""
    started_at: float = 0.0
    updated_at: float = 0.0
    devices: int = 1
    earlier_device_s: float = 0.0

    @property
    def device_s(self) -> float:
        """Devices times seconds, of all starts up to `updated_at`."""
        return self.earlier_device_s + max(0.0, self.updated_at - self.started_at) * self.devices

    @property
    def time_left_s(self) -> float | None:
        """Seconds until `max_samples` at the present rate; None while the rate is unknown."""
        if self.samples_per_s <= 0 or self.max_samples <= 0:
            return None
        return max(0, self.max_samples - self.samples_seen) / self.samples_per_s

    @property
    def is_silent(self) -> bool:
        """Whether its process has not been heard of for a while, so that it was probably killed."""
        return time.time() - self.updated_at > SECONDS_UNTIL_SILENT


@dataclass(frozen=True)
class Failure:
    """Why a stage failed, in one line, and whether it is the user's to mend."""

    message: str
    is_user_error: bool
    cause: Cause = Cause.UNKNOWN


_PROGRESS = TypeAdapter(Progress)
_SIZES = TypeAdapter(dict[str, int])
_FAILURE = TypeAdapter(Failure)
_HARDWARE = TypeAdapter(dict[str, Any])
_NOTHING_KNOWN = "it is left out"


def write_progress(work: Path, progress: Progress) -> None:
    """Publish progress; not flushed to disk, as losing it costs nothing."""
    write_json_atomically(work / PROGRESS, asdict(progress), is_flushed=False)


def read_progress(work: Path) -> Progress | None:
    """The last published progress; None without one, or where the file holds something else."""
    return read_or_none(_PROGRESS, work / PROGRESS, _NOTHING_KNOWN)


def write_failure(work: Path, failure: Failure) -> None:
    """Keep why a stage failed; cleared when it starts again."""
    write_json_atomically(work / FAILURE, asdict(failure))


def read_failure(work: Path) -> Failure | None:
    """Why the last attempt failed; None where it did not, or where the file holds something else."""
    return read_or_none(_FAILURE, work / FAILURE, _NOTHING_KNOWN)


def read_hardware(work: Path) -> dict[str, Any]:
    """What the stage runs on, as its process found it; {} before it started."""
    return read_or_none(_HARDWARE, work / HARDWARE, _NOTHING_KNOWN) or {}


def checkpoint_records(work: Path) -> list[Path]:
    """The records of a stage's checkpoints, the oldest first."""
    return sorted(path for path in (work / CHECKPOINTS).glob("samples-*.json") if samples_of(path) is not None)


def samples_of(checkpoint_record: Path) -> int | None:
    """`samples_seen` in a file name; None in that of something else."""
    digits = checkpoint_record.stem.removeprefix("samples-")
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def latest_checkpoint_samples(work: Path) -> int | None:
    """`samples_seen` of the newest checkpoint that is whole as far as sizes tell; None without one. Damage is said."""
    for record in reversed(checkpoint_records(work)):
        fault = _fault_of(record)
        if fault is None:
            return samples_of(record)
        if record.exists():  # a stage at work removes old ones
            warn(f"checkpoint {fault}; it is passed over")
    return None


def _fault_of(record: Path) -> str | None:
    """What is wrong with a checkpoint that has that record, as far as sizes tell. Older records have none."""
    try:
        sizes: dict[str, int] = _SIZES.validate_python(read_json(record).get("sizes", {}))
        files = {record.with_suffix(CHECKPOINT_SUFFIX) / name: size for name, size in sizes.items()}
        return next((f"{file} is cut" for file, size in files.items() if file.stat().st_size != size), None)
    except DamagedRecordError as error:
        return str(error)
    except ValidationError:
        return f"{record} cannot be read (its sizes are none)"
    except OSError as error:
        return f"{error.filename} is missing"


def result_path(frozen: Path, worker_pid: int) -> Path:
    """Where a worker process says how a frozen stage ended: one word, an `Outcome`."""
    return frozen.with_suffix(f".result-{worker_pid}")
