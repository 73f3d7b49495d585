"""`unclip sync`: uploads the W&B runs that were kept in files, each start once and in order, by `wandb sync`.

It also sends what the server lacks of starts that were online: rows that an outage or a kill kept from it, and the end
of a stage that was killed just after it had published.
"""

import argparse
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import StageInterrupted, UserError
from pipeline.tracking.settle import settle
from pipeline.tracking.wandb_log import WANDB_PROGRAM, cut_to_whole_records
from pipeline.tracking.wandb_record import (
    RECORD,
    WandbRecord,
    fragments,
    is_offline,
    mark_of,
    not_uploaded,
    read_record,
    started,
    write_record,
)
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.ownership import acquire
from pipeline.workflow.progress import SECONDS_UNTIL_SILENT, Phase, read_progress
from pipeline.workflow.runs import read_runs

_SECONDS_TO_ANSWER = 10.0
_ENDED = (Phase.INTERRUPTED, Phase.FAILED)


def main(arguments: Sequence[str]) -> int:
    """Upload; the exit status is 0, also where there was nothing to do."""
    parser = argparse.ArgumentParser("unclip sync", description="Upload what W&B lacks of the runs here, once.")
    parser.add_argument("run", nargs="?", help="name of a run or sweep; without it, all stages")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="paths.outputs of the run")
    options = parser.parse_args(arguments)
    outputs = options.outputs.absolute()
    works = _works(outputs, options.run)
    if works:
        os.environ.setdefault("WANDB_DIR", str(outputs))  # W&B's program leaves logs of its own
    import wandb

    result = sync(works, wandb.setup().settings.base_url)
    for log in result.left:
        print(f"left for later, as its stage is at work: {log.parent}")
    if not result.uploaded and not result.settled:
        print("nothing to upload")
    return 0


@dataclass(frozen=True)
class Synced:
    """How many starts were uploaded, the logs of stages at work, and how many runs got what the server lacked."""

    uploaded: int
    left: list[Path]
    settled: int = 0


def sync(works: Sequence[Path], server: str, program: Sequence[str] = WANDB_PROGRAM) -> Synced:
    """Send what W&B lacks of these stages' work, of each in the order of the starts.

    Raises `UserError` with the first failure, after all others were tried; a later start of a run that failed is not
    sent before it.
    """
    lacking = sorted((work for work in works if _lacks(work)), key=lambda work: _first(work))
    left = [log for work in lacking if _is_busy(work) for log in _logs_of(work)]
    ready = [work for work in lacking if not _is_busy(work)]
    if ready:
        _require(server)
    uploaded = settled = 0
    failures: list[UserError] = []
    for work in ready:
        one = _Work(work, program)
        try:
            one.sync()
        except UserError as failure:
            print(f"error: {failure}")
            failures.append(failure)
        uploaded, settled, left = uploaded + one.uploaded, settled + one.settled, [*left, *one.left]
    if failures:
        raise failures[0]
    return Synced(uploaded, left, settled)


def _works(outputs: Path, run: str | None) -> list[Path]:
    if run is None:
        return [path.parent for path in outputs.glob(f"work/*/*/{RECORD}")]
    store = ArtifactStore(outputs)
    stages = {(each.name, each.fingerprint) for record in read_runs(outputs, run) for each in record.stages}
    return [store.work(name, fingerprint) for name, fingerprint in sorted(stages)]


def _first(work: Path) -> str:
    """The first start that is not uploaded: a stage's inputs are to be there before it."""
    return min((started(log) for log in not_uploaded(work)), default="")


def _lacks(work: Path) -> bool:
    record = read_record(work)
    if record is None:
        return False
    return bool(not_uploaded(work)) or record.unsettled is not None or _lacks_end(work, record)


def _lacks_end(work: Path, record: WandbRecord) -> bool:
    """Whether a stage was killed after it had published, before its W&B run was finished."""
    store = ArtifactStore(work.parents[2])
    return record.open_fragment is not None and store.find(work.parent.name, work.name) is not None


def _is_busy(work: Path) -> bool:
    """Whether a process may still write to a log there; a killed one has it open until it has long been silent."""
    record, progress = read_record(work), read_progress(work)
    if record is None or record.open_fragment is None or progress is None:
        return False
    return not progress.is_silent and progress.phase not in _ENDED


def _logs_of(work: Path) -> list[Path]:
    """What is to be uploaded, the log that is written to among it."""
    record, waiting = read_record(work), not_uploaded(work)
    return [log for log in fragments(work) if log in waiting or (record and log.parent.name == record.open_fragment)]


class _Work:
    """What W&B lacks of one stage."""

    def __init__(self, work: Path, program: Sequence[str]) -> None:
        self.uploaded = 0
        self.settled = 0
        self.left: list[Path] = []
        self._work = work
        self._program = program

    def sync(self) -> None:
        """Send it, unless a process works on the stage. Raises `UserError` where it could not be."""
        giving_up = threading.Event()
        patience = threading.Timer(2 * SECONDS_UNTIL_SILENT, giving_up.set)
        patience.start()
        try:
            # No start of the stage may come in between.
            ownership = acquire(self._work, SECONDS_UNTIL_SILENT, giving_up)
        except StageInterrupted:
            self.left = _logs_of(self._work)
            return
        finally:
            patience.cancel()
        try:
            self._send()
        finally:
            ownership.release()

    @property
    def _record(self) -> WandbRecord:
        record = read_record(self._work)
        assert record is not None, "only stages with a record are synced"
        return record

    def _send(self) -> None:
        if self._record.unsettled is not None:
            self._settle()
        for log in not_uploaded(self._work):
            self._upload(log)
        if _lacks_end(self._work, self._record):
            self._settle()

    def _settle(self) -> None:
        record = self._record
        print(f"asking the server what it lacks of {record.name}", flush=True)
        settle(self._work, record)
        self.settled += 1

    def _upload(self, log: Path) -> None:
        self._refuse_what_comes_too_late(log)
        if cut_to_whole_records(log):
            print(f"{log.parent.name} was killed while it wrote: its last, unfinished record is left out")
        record = self._record
        # Whatever ends this process now, the next one knows that rows of this log may be there.
        write_record(self._work, record.with_upload(log.parent.name))
        print(f"uploading {log.parent.name} ({record.name})", flush=True)
        said = _run([*self._program, "sync", str(log.parent)])
        if not mark_of(log).exists():
            raise UserError(
                f"wandb sync {log.parent} did not upload it: {said}; see `wandb login`, then run this again"
            )
        is_open = record.open_fragment == log.parent.name
        open_fragment = None if is_open and not _lacks_end(self._work, record) else record.open_fragment
        write_record(
            self._work, replace(record.with_upload(log.parent.name), unsettled=None, open_fragment=open_fragment)
        )
        self.uploaded += 1

    def _refuse_what_comes_too_late(self, log: Path) -> None:
        """Earlier versions went on online while an offline start was not uploaded."""
        known = self._record.uploads
        later = [
            each.parent.name
            for each in fragments(self._work)
            if not is_offline(each) and each.parent.name not in known and started(each) > started(log)
        ]
        if later:
            raise UserError(
                f"{log.parent} is older than {later[-1]}, which is online already, and its rows would come after newer "
                f"ones: left out; `wandb sync {log.parent}` uploads it all the same"
            )


def _require(server: str) -> None:
    """Ask before, since `wandb sync` tries for very long. Any answer will do but that of a server in trouble."""
    try:
        urllib.request.urlopen(server, timeout=_SECONDS_TO_ANSWER).close()
    except OSError as error:
        # Some do not know the page; 501 is said by one that knows no such request.
        if isinstance(error, urllib.error.HTTPError) and (error.code < 500 or error.code == 501):
            return
        raise UserError(
            f"the W&B server {server} is not reached ({error}); nothing was uploaded: try again with a network"
        ) from error


def _run(command: Sequence[str]) -> str:
    """Run it, with what it says shown as it comes; its last error, or without one its last line."""
    last, error = "it said nothing", ""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last = line.strip()
                error = last if "ERROR" in last else error
                print(f"  {last}", flush=True)
    return error or last
