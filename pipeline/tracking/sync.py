"""`unclip sync`: sends W&B what it lacks of the stages' records, as they were offline, cut off or killed."""

import os
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import StageInterrupted, UserError
from pipeline.options import command_parser
from pipeline.tracking.sending import has_all, start_sender
from pipeline.tracking.wandb_record import WANDB, WandbRecord, begun, read_record, write_record
from pipeline.tracking.wandb_run import Ending
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.frozen import FROZEN, FrozenStage, read_frozen
from pipeline.workflow.ownership import ATTEMPTS, acquire
from pipeline.workflow.progress import SECONDS_UNTIL_SILENT, Phase, read_progress
from pipeline.workflow.record import AXIS, METRICS, PICTURE, Entry, Replay, read_standing
from pipeline.workflow.runs import read_runs, require_outputs
from pipeline.workflow.sealed import content_of, sealed_line

_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_SEND_ONE = 3600.0
_ENDINGS = {Phase.INTERRUPTED: Ending.INTERRUPTED, Phase.FAILED: Ending.FAILED}


def main(arguments: Sequence[str]) -> int:
    """Send it; the exit status is 0, also where there was nothing to do."""
    parser = command_parser("sync", "Send W&B what it lacks of the runs here, once.")
    parser.add_argument("run", nargs="?", help="name of a run or sweep; without it, all stages")
    options = parser.parse_args(arguments)
    import wandb

    works = _works(options.outputs, options.run)
    for log in _kept_by_earlier_versions(works):
        print(f"{log} is of an earlier version: `wandb sync {log}` uploads it")
    result = sync(works, wandb.setup().settings.base_url)
    for work in result.left:
        print(f"left for later, as its stage is at work: {work}")
    if not result.sent:
        print("nothing to upload")
    return 0


@dataclass(frozen=True)
class Synced:
    """The work directories whose records were sent, and those of stages at work."""

    sent: list[Path] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)


def sync(works: Sequence[Path], server: str) -> Synced:
    """Send what the server lacks of these stages, of the one that began first at first: its artifact is others' input.

    Raises `UserError` with the first failure, after all others were tried.
    """
    result = Synced()
    lacking: list[tuple[float, Path, WandbRecord]] = []
    failures: list[UserError] = []

    def failed(failure: UserError) -> None:
        print(f"error: {failure}")
        failures.append(failure)

    for work in works:
        try:
            record = read_record(work) or _restored(work)
            if record is not None and _lacks(work):
                lacking.append((record.began_at, work, record))
        except UserError as failure:
            failed(failure)
    if lacking:
        _require(server)
    for _, work, record in sorted(lacking, key=lambda each: each[:2]):
        try:
            (result.sent if _sync_one(work, record) else result.left).append(work)
        except UserError as failure:
            failed(failure)
    if failures:
        raise failures[0]
    return result


def _works(outputs: Path, run: str | None) -> list[Path]:
    require_outputs(outputs)
    if run is None:
        return sorted(path for path in outputs.glob("work/*/[0-9a-f]*") if path.is_dir())
    store = ArtifactStore(outputs)
    stages = {(each.name, each.fingerprint) for record in read_runs(outputs, run) for each in record.stages}
    return [store.work(name, fingerprint) for name, fingerprint in sorted(stages)]


def _restored(work: Path) -> WandbRecord | None:
    """What a stage's lost record can be told anew from: its artifact knows the W&B run. None where it had none."""
    artifact = ArtifactStore(work.parents[2]).readable(work.parent.name, work.name)
    wandb_id = None if artifact is None else artifact.manifest.tracking.get("wandb_id")
    if artifact is None or not isinstance(wandb_id, str) or not (work / ATTEMPTS).is_dir():  # it was made elsewhere
        return None
    lost = f"{work / WANDB} was lost or damaged"
    frozen = _last_frozen(work)
    if frozen is None or _has_lost_rows(work, artifact):
        missing, rows = work / (FROZEN if frozen is None else METRICS), artifact.path / METRICS
        print(f"left out: {lost}, and {missing} is gone or damaged; the stage's rows are in {rows}")
        return None
    record = replace(begun(frozen), id=wandb_id)
    write_record(work, record)
    print(f"{lost}; it is written anew, for the W&B run of the stage's artifact")
    return record


def _mend_rows(work: Path, artifact: Artifact, record: WandbRecord) -> None:
    """Before W&B has any entry, take the artifact's rows for those that were lost; the pictures that are known stay.

    W&B counts the entries. So where it has some, damaged ones are left out, and `UserError` is raised for lost ones.
    """
    kept = artifact.opened().path / METRICS
    if not record.sent:
        pictures = [entry for entry in read_standing(work) if PICTURE in entry]
        entries = sorted([*read_standing(artifact.path), *pictures], key=lambda entry: entry[AXIS])
        beside = work / f".{METRICS}.{os.getpid()}"
        beside.write_bytes(b"".join(map(sealed_line, entries)))
        beside.replace(work / METRICS)
        print(f"{work / METRICS} was lost or damaged; its rows are taken from {kept}")
    elif _is_cut(work, artifact):
        raise UserError(
            f"{work / METRICS} is gone or cut, of which W&B has {record.sent} entries; put it back, or remove "
            f"{work / WANDB} to leave the stage out, whose rows are in {kept}"
        )


def _has_lost_rows(work: Path, artifact: Artifact) -> bool:
    """Whether they are not those of the artifact, which got them all."""
    return _rows(work) != read_standing(artifact.path)


def _is_cut(work: Path, artifact: Artifact) -> bool:
    """Whether lines are gone, as far as their number and the last one tell."""
    rows = read_standing(artifact.path)
    lines = content_of(work / METRICS).count(b"\n") if (work / METRICS).is_file() else 0
    return lines < len(rows) or _rows(work)[-1:] != rows[-1:]


def _rows(work: Path) -> list[Entry]:
    return [entry for entry in read_standing(work) if PICTURE not in entry]


def _kept_by_earlier_versions(works: Sequence[Path]) -> list[Path]:
    """Offline starts in W&B's own files that `wandb sync` has left no mark beside."""
    logs = [log for work in works for log in sorted(work.glob("wandb/offline-run-*/*.wandb"))]
    return [log.parent for log in logs if not log.with_suffix(".wandb.synced").exists()]


def _lacks(work: Path) -> bool:
    record, replay = read_record(work), Replay(work)
    for _ in replay.new():
        pass
    if record is None or (record.sent, record.told) == (replay.count, _ending_of(work).value):
        return False
    artifact = ArtifactStore(work.parents[2]).readable(work.parent.name, work.name)
    if artifact is not None and _has_lost_rows(work, artifact):
        if record.told == Ending.FINISHED.value:
            rows = artifact.path / METRICS
            print(f"{work / METRICS} is gone or damaged; W&B has all of it, and the stage's rows are in {rows}")
            return False
        _mend_rows(work, artifact, record)
    return True


def _ending_of(work: Path) -> Ending:
    """How the last start ended; open where it was killed and is to go on, or is at work."""
    if ArtifactStore(work.parents[2]).readable(work.parent.name, work.name) is not None:
        return Ending.FINISHED
    progress = read_progress(work)
    return _ENDINGS.get(progress.phase, Ending.OPEN) if progress else Ending.OPEN


def _sync_one(work: Path, record: WandbRecord) -> bool:
    """Send what is lacking, unless a process works on the stage; whether it was sent."""
    progress = read_progress(work)
    if _ending_of(work) is Ending.OPEN and progress is not None and not progress.is_silent:
        return False
    giving_up = threading.Event()
    patience = threading.Timer(2 * SECONDS_UNTIL_SILENT, giving_up.set)
    patience.start()
    try:
        ownership = acquire(work, SECONDS_UNTIL_SILENT, giving_up)  # no start of the stage may come in between
    except StageInterrupted:
        return False
    finally:
        patience.cancel()
    try:
        if _lacks(work):
            _send(work, record)
    finally:
        ownership.release()
    return True


def _send(work: Path, record: WandbRecord) -> None:
    frozen = _last_frozen(work)
    if frozen is None:
        raise UserError(
            f"{work} has no frozen stage that can be read, from which W&B's config could be told; if the stage is "
            f"finished, remove {work / WANDB} to leave it out, else run it again"
        )
    print(f"uploading {record.name} ({work})", flush=True)
    with tempfile.TemporaryFile("w+") as said:
        if not has_all(start_sender(frozen, _ending_of(work), said), _SECONDS_TO_SEND_ONE):
            said.seek(0)
            last = ["it took too long", *said.read().strip().splitlines()][-1]
            raise UserError(f"{record.name} was not uploaded: {last}; see `wandb login`, then run this again")


def _last_frozen(work: Path) -> FrozenStage | None:
    """What the stage was started by last, of what can be read."""
    for file in sorted((work / FROZEN).glob("*.json"), key=lambda path: -path.lstat().st_mtime):
        with suppress(UserError, OSError):
            # Of another host the outputs may have another path here.
            return read_frozen(file).model_copy(update={"outputs": work.parents[2]})
    return None


def _require(server: str) -> None:
    """Ask before, since W&B tries for long. Any answer will do but that of a server in trouble."""
    try:
        urllib.request.urlopen(server, timeout=_SECONDS_TO_ANSWER).close()
    except OSError as error:
        # Some do not know the page; 501 is said by one that knows no such request.
        if isinstance(error, urllib.error.HTTPError) and (error.code < 500 or error.code == 501):
            return
        raise UserError(
            f"the W&B server {server} is not reached ({error}); nothing was uploaded: try again with a network"
        ) from error
