"""Who works on a stage: one process (group) at a time, on any host that shares the file system.

Each attempt at a stage has a number, taken by creating `attempts/<number>.json` in its work directory, which succeeds
for one process alone. The highest number owns the stage, until it is over, its process is seen to be dead, or it has
given no sign of life for a lease. Whoever finds a higher number than its own has lost the stage and writes no more.

A batch job that starts again takes over from its earlier start at once: its queue has given that one up, even where its
processes go on (a node that lost its daemon), and they must not publish over the later one.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter
from typing_extensions import override

from pipeline.errors import StageInterrupted
from pipeline.workflow.progress import Phase, read_progress
from pipeline.workflow.sealed import read_or_none, write_json_atomically

ATTEMPTS = "attempts"
BEATS_PER_LEASE = 6
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_BEGIN = 600.0
"""A process may import for so long before its first sign of life, from a slow disk too."""
SECONDS_UNTIL_GONE = 3600.0
"""After so long without a sign of life a process of another host is none that space is kept for."""


class StageLost(StageInterrupted):
    """Another process has taken the stage over."""


@dataclass(frozen=True)
class JobStart:
    """A start of a batch job; `restarts` counts the starts before it."""

    job_id: str
    restarts: int

    def is_before(self, other: "JobStart | None") -> bool:
        """Whether the other one is a later start of the same job."""
        return other is not None and self.job_id == other.job_id and self.restarts < other.restarts


@dataclass(frozen=True)
class Claim:
    """Who made an attempt. `host` changes with every boot; `pid_started` tells apart processes of the same number.

    `job` is the batch job that it is part of, if any.
    """

    attempt: int
    host: str
    pid: int
    pid_started: int
    lease_s: float
    job: JobStart | None = None

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone. Of another host's (or another boot's) nothing is known."""
        if self.host != this_host():
            return False
        started = process_started(self.pid)
        if started:
            return started != self.pid_started
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return False  # another user's, whom this system hides
        except ProcessLookupError:
            pass
        return True


_CLAIM = TypeAdapter(Claim)


class Ownership:
    """The right to work on a stage, as a process has it that has none: all but the first of those that train together.

    Such a process writes nothing, and cannot lose the stage.
    """

    attempt = 0

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the stage over."""
        return False

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes what others read."""
        return False

    def require(self) -> None:
        """Raise `StageLost` if another process has the stage. To be called just before what lasts is written."""

    def release(self) -> None:
        """Say that this attempt is over."""


class Owner(Ownership):
    """The right to work on a stage, kept by signs of life from a thread until `release`."""

    def __init__(self, directory: Path, attempt: int, lease_s: float) -> None:
        self.attempt = attempt
        self._directory = directory
        self._lease_s = lease_s
        self._beats = 0
        self._looked_at = time.monotonic()
        self._lost = threading.Event()
        self._over = threading.Event()
        # Written in place: a renamed file could stay hidden behind another host's cache of the directory.
        self._alive = os.open(self._file("alive"), os.O_WRONLY | os.O_CREAT, 0o644)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    @override
    def is_lost(self) -> bool:
        """Whether a later attempt was seen. The file system is asked again where the last answer may be out of date."""
        if time.monotonic() - self._looked_at > self._lease_s / 2:
            self._look()
        return self._lost.is_set()

    @property
    @override
    def writes(self) -> bool:
        return not self.is_lost

    @override
    def require(self) -> None:
        self._look()  # the file system, whose last answer may be out of date
        if self._lost.is_set():
            raise StageLost(f"attempt {self.attempt} was taken for dead, and another process has the stage now")

    @override
    def release(self) -> None:
        self._over.set()
        self._thread.join()
        os.close(self._alive)
        with suppress(OSError):  # without it, the next one has to see that this process is gone
            self._file("over").touch()

    def forget_earlier(self) -> None:
        """Remove what is left of earlier attempts; the numbers go on."""
        for path in self._directory.glob("[0-9]*.*"):
            if int(path.stem) < self.attempt:
                path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while True:
            self._beats += 1
            with suppress(OSError):  # a full disk or a network file system's bad moment; the next beat tries again
                os.pwrite(self._alive, f"{self._beats:020}".encode(), 0)
                self._look()
            if self._over.wait(self._lease_s / BEATS_PER_LEASE):
                return

    def _look(self) -> None:
        # Read before the look: whoever is stopped in its middle for a while must not take its answer for fresh.
        now = time.monotonic()
        if latest_attempt(self._directory) > self.attempt:
            self._lost.set()
        self._looked_at = now

    def _file(self, kind: str) -> Path:
        return self._directory / f"{self.attempt:06}.{kind}"


def acquire(work: Path, lease_s: float, interruption: threading.Event, job: JobStart | None = None) -> Owner:
    """Wait until nobody else works on the stage of that work directory, and own it.

    Raises:
        StageInterrupted: `interruption` was set while another process had it.
        StageLost: a later start of `job`, which this process is part of, has it.
    """
    directory = work / ATTEMPTS
    directory.mkdir(parents=True, exist_ok=True)
    vacancy = Vacancy(work, lease_s, job)
    while True:
        latest = latest_attempt(directory)
        if vacancy.is_free_after(latest):
            if _claim(directory, latest + 1, lease_s, job):
                return Owner(directory, latest + 1, lease_s)
        elif interruption.wait(min(SECONDS_BETWEEN_LOOKS, lease_s / BEATS_PER_LEASE)):
            raise StageInterrupted("stopped while another process had this stage")


def wait_for_first_process(
    work: Path, is_finished: Callable[[], bool], interruption: threading.Event, job: JobStart
) -> None:
    """For the other processes of a batch job: wait until the first one owns the stage, or it is finished.

    Raises:
        StageInterrupted: `interruption` was set, or the job was started again meanwhile.
    """
    directory = work / ATTEMPTS
    while not is_finished():
        latest = latest_attempt(directory)
        claim = _read_claim(directory, latest) if latest else None
        if claim is not None and claim.job == job and not _is_over(directory, latest):
            return
        if claim is not None and job.is_before(claim.job):
            raise StageLost("a later start of this job has the stage now")
        if interruption.wait(SECONDS_BETWEEN_LOOKS):
            raise StageInterrupted("stopped while the first process waited for this stage")


def latest_attempt(directory: Path) -> int:
    """The highest number that was taken; 0 without one."""
    return max((int(path.stem) for path in directory.glob("[0-9]*.json") if path.stem.isdecimal()), default=0)


class Vacancy:
    """Whether a stage is free to be taken, to be asked again and again.

    It notices an owner without a sign of life for a lease, by this host's clock alone.
    """

    def __init__(self, work: Path, lease_s: float, job: JobStart | None = None) -> None:
        self._directory = work / ATTEMPTS
        self._lease_s = lease_s
        self._job = job
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0

    @property
    def is_free(self) -> bool:
        """Whether nobody works on the stage now. Raises `StageLost` where a later start of `job` does."""
        return self.is_free_after(latest_attempt(self._directory))

    def is_free_after(self, attempt: int) -> bool:
        """Whether that attempt, the latest one, leaves the stage to others."""
        if attempt == 0 or _is_over(self._directory, attempt):
            return True
        claim = _read_claim(self._directory, attempt)
        if claim is None:
            return self._is_silent(attempt, self._lease_s)
        if self._job is not None and self._job.is_before(claim.job):
            raise StageLost("a later start of this job has the stage now")
        if claim.job is not None and claim.job.is_before(self._job):
            return True
        return claim.is_dead or self._is_silent(attempt, max(self._lease_s, claim.lease_s))

    def _is_silent(self, attempt: int, lease_s: float) -> bool:
        beat = _beat_of(self._directory, attempt)
        if self._seen != (attempt, beat):
            self._seen, self._since = (attempt, beat), time.monotonic()
        return time.monotonic() - self._since > lease_s


TAKEN_AWAY = "is gone; put it back, or run again to make it anew"
"""What is to be said of the artifact of a stage that `was_published`, where there is none."""


PULLED = "pulled.json"
"""In the work directory of a stage whose artifact was fetched: no attempt here tells of it."""


def was_published(work: Path) -> bool:
    """Whether the last attempt at a stage came to its end, or its artifact was fetched.

    Where it is not there, somebody took it away.
    """
    progress = read_progress(work)
    if progress is None:
        return (work / PULLED).exists()
    latest = latest_attempt(work / ATTEMPTS)
    return progress.phase is Phase.PUBLISHING and _is_over(work / ATTEMPTS, latest)


class Pulse:
    """Listens to whoever works on a stage, by this host's clock alone."""

    def __init__(self, work: Path) -> None:
        self._directory = work / ATTEMPTS
        self._seen = self._look()
        self._since = self._looked_at = time.monotonic()
        self._has_been_heard = False

    def silent_s(self) -> float:
        """Seconds since the last sign of life, or since this was made."""
        now = time.monotonic()
        if now - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            seen, self._looked_at = self._look(), now
            if seen != self._seen:
                self._seen, self._since, self._has_been_heard = seen, now, True
        return now - self._since

    def is_lost(self, after_s: float) -> bool:
        """Whether nothing was heard for so long, or for `SECONDS_TO_BEGIN` before the first sign of life."""
        return self.silent_s() > (after_s if self._has_been_heard else max(after_s, SECONDS_TO_BEGIN))

    def _look(self) -> tuple[int, bytes]:
        attempt = latest_attempt(self._directory)
        return attempt, _beat_of(self._directory, attempt)


def at_work(work: Path) -> str | None:
    """Who may work there now, in words, by one look and without waiting for a lease; None if nobody does.

    Of this host's processes it is known. One of elsewhere counts for an hour after its last sign of life.
    """
    directory = work / ATTEMPTS
    attempt = latest_attempt(directory)
    if attempt == 0 or _is_over(directory, attempt):
        return None
    claim = _read_claim(directory, attempt)
    if claim is not None and claim.host == this_host():
        process = process_here(work)
        return None if process is None else f"process {process} is at work on it"
    beats = [file.stat().st_mtime for file in directory.glob(f"{attempt:06}.*")]
    if time.time() - max(beats, default=0.0) > SECONDS_UNTIL_GONE:
        return None
    host = "another host" if claim is None else claim.host.partition("/")[0]
    return f"a process of {host} may be at work on it"


def process_here(work: Path) -> int | None:
    """The process of this host that works there now, or None."""
    directory = work / ATTEMPTS
    attempt = latest_attempt(directory)
    claim = None if attempt == 0 or _is_over(directory, attempt) else _read_claim(directory, attempt)
    return None if claim is None or claim.host != this_host() or claim.is_dead else claim.pid


def _beat_of(directory: Path, attempt: int) -> bytes:
    try:
        return (directory / f"{attempt:06}.alive").read_bytes()
    except FileNotFoundError:
        return b""


def _is_over(directory: Path, attempt: int) -> bool:
    return os.path.lexists(directory / f"{attempt:06}.over")


def _read_claim(directory: Path, attempt: int) -> Claim | None:
    """None where a power cut took its content: its owner is given a lease to show that it lives."""
    return read_or_none(
        _CLAIM, directory / f"{attempt:06}.json", "without a sign of life for a lease, it counts as dead"
    )


def _claim(directory: Path, attempt: int, lease_s: float, job: JobStart | None) -> bool:
    """Take a number; False where another process was faster."""
    claim = Claim(attempt, this_host(), os.getpid(), process_started(os.getpid()), lease_s, job)
    temporary = directory / f".{attempt:06}.{uuid4().hex}"
    write_json_atomically(temporary, asdict(claim))
    try:
        # A link appears with its content, and only one can have the name: on network file systems too.
        os.link(temporary, directory / f"{attempt:06}.json")
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


@cache
def this_host() -> str:
    """This host, this boot, this process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else "unknown"
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot_id}/{namespace.readlink() if namespace.exists() else 'unknown'}"


def process_started(pid: int) -> int:
    """When a process of this host started, in clock ticks since boot; 0 if there is none (or only its corpse)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
