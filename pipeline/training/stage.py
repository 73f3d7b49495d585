"""The entry point of every stage: from a frozen stage to a published artifact."""

import subprocess
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from pipeline.data.mixing import named_seed
from pipeline.errors import StageInterrupted, UserError
from pipeline.training.checkpoints import latest_checkpoint
from pipeline.training.context import ProgressWriter, StageContext, StageResult, process_rank
from pipeline.training.tracking import METRICS, Tracker
from pipeline.workflow.artifacts import SCHEMA_VERSION, Manifest, describe_files
from pipeline.workflow.declaration import resolve
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import FAILURE, Failure, Outcome, Phase, write_failure

LOCK = "lock"
SECONDS_BETWEEN_LOCK_TRIES = 1.0


def run_stage(frozen: FrozenStage, interruption: threading.Event) -> Outcome:
    """Run a frozen stage unless its artifact is there, and publish what it makes.

    One process (group) at a time works on a stage; another that comes to it waits and then reuses. A failure is left in
    the work directory for whoever waits for this stage; nothing is raised.
    """
    frozen.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(frozen.work / LOCK)
    try:
        if process_rank() == 0:
            _acquire(lock, interruption)
        if frozen.store.find(frozen.stage, frozen.fingerprint) is not None:
            return Outcome.REUSED
        (frozen.work / FAILURE).unlink(missing_ok=True)
        with ProgressWriter(frozen.work) as progress:
            return _attempt(frozen, progress, interruption)
    except StageInterrupted:
        return Outcome.INTERRUPTED
    finally:
        lock.release()


def _acquire(lock: FileLock, interruption: threading.Event) -> None:
    while True:
        try:
            lock.acquire(timeout=SECONDS_BETWEEN_LOCK_TRIES)
            return
        except Timeout:
            if interruption.is_set():
                raise StageInterrupted("stopped while another process had this stage") from None


def _attempt(frozen: FrozenStage, progress: ProgressWriter, interruption: threading.Event) -> Outcome:
    try:
        _run_and_publish(frozen, progress, interruption)
    except StageInterrupted:
        progress.update(phase=Phase.INTERRUPTED)
        return Outcome.INTERRUPTED
    except UserError as error:
        return _fail(frozen, progress, Failure(str(error), is_user_error=True))
    except Exception as error:  # the boundary of a stage: whatever it was, say it and keep the traceback in the log
        traceback.print_exc()
        return _fail(frozen, progress, Failure(f"{type(error).__name__}: {error}", is_user_error=False))
    return Outcome.FINISHED


def _fail(frozen: FrozenStage, progress: ProgressWriter, failure: Failure) -> Outcome:
    progress.update(phase=Phase.FAILED)
    write_failure(frozen.work, failure)
    return Outcome.FAILED


def _run_and_publish(frozen: FrozenStage, progress: ProgressWriter, interruption: threading.Event) -> None:
    started = time.monotonic()
    is_first = process_rank() == 0
    declaration = frozen.declaration
    settings = frozen.read_settings()
    inputs = frozen.find_inputs()
    checkpoint = latest_checkpoint(frozen.work)
    elapsed_before_s = checkpoint.elapsed_s if checkpoint else 0.0
    if frozen.trainer.cpu_threads is not None:
        torch.set_num_threads(frozen.trainer.cpu_threads)
    torch.manual_seed(named_seed(frozen.seed, frozen.stage))
    output = frozen.store.start_building(frozen.stage, frozen.fingerprint) if is_first else frozen.work
    with Tracker(frozen, enabled=is_first) as tracker:
        context = StageContext(frozen, settings, inputs, output, tracker, progress, interruption)
        result: StageResult = resolve(declaration.run)(context)
        tracker.summarise(result.metrics)
    if is_first:
        progress.update(phase=Phase.PUBLISHING, activity="publishing")
        _publish(frozen, output, result, elapsed_before_s + time.monotonic() - started)


def _publish(frozen: FrozenStage, output: Path, result: StageResult, duration_s: float) -> None:
    rows = frozen.work / METRICS
    if rows.exists():
        (output / METRICS).write_bytes(rows.read_bytes())
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        stage=frozen.stage,
        kind=frozen.kind,
        fingerprint=frozen.fingerprint,
        identity=frozen.identity,
        inputs={name: [each.fingerprint for each in found] for name, found in frozen.inputs.items()},
        config=frozen.settings,
        code_version=code_version(),
        made_by_run=frozen.run,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        duration_s=round(duration_s, 3),
        samples_seen=result.samples_seen,
        numbers=result.numbers,
        metrics=result.metrics,
        files=describe_files(output),
    )
    frozen.store.publish(output, manifest)


def code_version() -> str:
    """The package's version, and the commit where the code is a git checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    commit = (
        subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        if (root / ".git").exists()
        else None
    )
    suffix = f"+{commit.stdout.strip()}" if commit is not None and commit.returncode == 0 else ""
    return f"{version('unclip')}{suffix}"
