"""Sends W&B what it lacks of a stage: rows and pictures that never arrived, and of a finished stage how it ended."""

from dataclasses import replace
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tracking.own_record import read_entries
from pipeline.tracking.wandb_record import WandbRecord, mark_of, not_uploaded, read_record, write_record
from pipeline.tracking.wandb_run import Ending, WandbRun
from pipeline.tracking.wandb_session import TellsEnd, forget_session
from pipeline.workflow.frozen import FrozenStage, read_frozen
from pipeline.workflow.progress import Phase, read_progress


def send_lacking(run: WandbRun, frozen: FrozenStage) -> None:
    """The stage's own record, as far as W&B lacks it, and the end of a finished stage: its summary and its artifact."""
    send_entries(run, frozen.work)
    artifact = frozen.store.find(frozen.stage, frozen.fingerprint)
    if artifact is not None:
        run.summarise(artifact.manifest.metrics)
        run.log_artifact(artifact)


def send_entries(run: WandbRun, work: Path) -> None:
    """The rows and pictures of the own record that W&B lacks, in the order of the axis."""
    for entry in read_entries(work):
        if "captions" not in entry:
            run.log(entry)
        elif Path(entry["file"]).exists():
            run.log_picture(entry["samples_seen"], entry["name"], Path(entry["file"]), entry["captions"])


def settle(work: Path, record: WandbRecord) -> None:
    """Open the run once more, online, for what the server lacks of the starts that sent to it.

    How the stage ended is told unless offline starts are uploaded after it.

    Raises `UserError` where the server does not take it.
    """
    frozen = _last_frozen(work)
    is_last = not not_uploaded(work)
    ending = _ending_of(frozen) if is_last else None
    try:
        run = WandbRun.settling(frozen, record, TellsEnd.NO if ending is None else TellsEnd.YES)
    except Exception as error:
        forget_session()
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the W&B run {record.name} was not opened ({said}); see `wandb login`, then run this again"
        ) from error
    if is_last:
        send_lacking(run, frozen)
    else:
        send_entries(run, work)
    is_complete = run.finish(ending or Ending.FINISHED)
    forget_session()
    if not is_complete:
        raise UserError(f"W&B has not all of {record.name}; run this again: it sends what is still missing")
    if not is_last:
        _resume_uploads(work, record, run.untouched)


def _resume_uploads(work: Path, record: WandbRecord, untouched: Path | None) -> None:
    """Say where the uploads go on, now that the server has all of those that had begun but for the `untouched` one."""
    known = read_record(work)
    assert known is not None, "it was written when the run was opened"
    open_fragment = record.open_fragment
    for log in not_uploaded(work):
        if log.parent.name in record.uploads and log != untouched:
            mark_of(log).touch()
            open_fragment = log.parent.name  # its rows were sent in its place, and not its end
    uploads = tuple(name for name in known.uploads if untouched is None or name != untouched.parent.name)
    write_record(work, replace(known, uploads=uploads, open_fragment=open_fragment))


def _last_frozen(work: Path) -> FrozenStage:
    files = sorted((work / "frozen").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{work} has no frozen stage, from which what W&B lacks could be told; run the stage again")
    # Of another host the outputs may have another path here.
    return read_frozen(files[-1]).model_copy(update={"outputs": work.parents[2]})


def _ending_of(frozen: FrozenStage) -> Ending | None:
    """How the last start ended; None where it was killed and is to be gone on with."""
    if frozen.store.find(frozen.stage, frozen.fingerprint) is not None:
        return Ending.FINISHED
    progress = read_progress(frozen.work)
    phase = progress.phase if progress else None
    return {Phase.INTERRUPTED: Ending.INTERRUPTED, Phase.FAILED: Ending.FAILED}.get(phase) if phase else None
