"""The entry point of every stage: from a frozen stage to a published artifact."""

import shutil
import threading
import time
import traceback
from dataclasses import dataclass
from itertools import chain

import torch

from pipeline.data.mixing import named_seed
from pipeline.errors import StageInterrupted, UserError
from pipeline.launch.identity import this_process
from pipeline.tracking import Tracker
from pipeline.training.context import Attempt, ProgressWriter, StageContext, StageResult
from pipeline.training.failures import explained
from pipeline.training.hardware import record_hardware
from pipeline.workflow import code
from pipeline.workflow.artifacts import SCHEMA_VERSION, Manifest
from pipeline.workflow.checkpoint import latest_checkpoint
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.declaration import resolve
from pipeline.workflow.digests import describe_files
from pipeline.workflow.fingerprint import counted_settings
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.inputs_read import begin_with, inputs_read
from pipeline.workflow.ownership import Ownership, StageLost, acquire, wait_for_first_process
from pipeline.workflow.progress import (
    CHECKPOINTS,
    FAILURE,
    Failure,
    Outcome,
    Phase,
    read_failure,
    read_hardware,
    write_failure,
)
from pipeline.workflow.publish import publish, start_building
from pipeline.workflow.record import write_rows


@dataclass(frozen=True)
class Spent:
    """What a stage took: the seconds that its result is the work of, and devices times seconds of all its starts."""

    duration_s: float
    device_s: float


THREADS_AT_START = torch.get_num_threads()
"""What the launcher gave to this process, for the stages that set no number: one process can run several."""


def run_stage(frozen: FrozenStage, interruption: threading.Event) -> Outcome:
    """Run a frozen stage unless its artifact is there, and publish what it makes.

    One process (group) at a time works on a stage; another that comes to it waits and then reuses. A failure is left in
    the work directory for whoever waits for this stage; nothing is raised.
    """

    def is_finished() -> bool:
        try:
            return frozen.store.find(frozen.stage, frozen.fingerprint) is not None
        except DamagedArtifactError:  # to be made anew, or this stage would not have been started
            return False

    if is_finished():
        return Outcome.REUSED
    process = this_process()
    ownership = Ownership()
    try:
        frozen.work.mkdir(parents=True, exist_ok=True)
        if process.is_first:
            ownership = acquire(frozen.work, frozen.trainer.lease_s, interruption, process.job)
        elif process.world_size is not None and process.job is not None:
            # Elsewhere the first process starts the others when it owns the stage.
            wait_for_first_process(frozen.work, is_finished, interruption, process.job)
        if is_finished():
            return Outcome.REUSED
        if process.is_first:
            (frozen.work / FAILURE).unlink(missing_ok=True)
        with ProgressWriter(frozen.work, ownership, frozen.tasks.total) as progress:
            return _outcome_of(Attempt(frozen, process, ownership, progress, interruption))
    except StageInterrupted:
        return Outcome.INTERRUPTED
    except OSError as error:  # of the stage's own directory
        return _failed(error, frozen)
    finally:
        ownership.release()


def _outcome_of(attempt: Attempt) -> Outcome:
    try:
        _run_and_publish(attempt)
    except StageLost as lost:
        return _gave_way(lost)
    except StageInterrupted as stopped:
        print(stopped, flush=True)
        attempt.progress.update(phase=Phase.INTERRUPTED)
        return Outcome.INTERRUPTED
    except Exception as error:  # the boundary of a stage: whatever it was, say it and keep the traceback in the log
        if attempt.is_lost:
            return _gave_way(error)
        attempt.progress.update(phase=Phase.FAILED)
        return _failed(error, attempt.frozen)
    if attempt.frozen.trainer.drop_checkpoints and attempt.is_first_process:
        shutil.rmtree(attempt.work / CHECKPOINTS, ignore_errors=True)
    return Outcome.FINISHED


def _failed(error: Exception, frozen: FrozenStage) -> Outcome:
    if not isinstance(error, UserError):
        traceback.print_exc()
    _write_failure(frozen, explained(error, frozen))
    return Outcome.FAILED


def _gave_way(error: Exception) -> Outcome:
    """Say that the stage is another process's now, whichever part of this one noticed; nothing is written."""
    print(f"stopped, as another process has the stage now ({error})", flush=True)
    return Outcome.INTERRUPTED


def _write_failure(frozen: FrozenStage, failure: Failure) -> None:
    """Keep the failure; of several processes' what the user can mend, for the others fail in its wake."""
    try:
        known = read_failure(frozen.work)
        if known is None or (failure.is_user_error and not known.is_user_error):
            write_failure(frozen.work, failure)
    except OSError:  # a full disk, or a directory that is none; the log may have room in the block that it has
        print(failure.message, flush=True)


def _run_and_publish(attempt: Attempt) -> None:
    started = time.monotonic()
    frozen = attempt.frozen
    version = code.code_version() if attempt.is_first_process else code.UNKNOWN  # now: others may work on it meanwhile
    record = code.require(frozen.outputs, frozen.code) if frozen.code is not None else None
    settings = frozen.read_settings()
    # One process of each node verifies them; where it fails, all do.
    inputs = frozen.open_inputs() if attempt.process.local_rank == 0 else frozen.find_inputs()
    checkpoint = latest_checkpoint(frozen.work)
    elapsed_before_s = checkpoint.elapsed_s if checkpoint else 0.0
    torch.set_num_threads(frozen.trainer.cpu_threads or THREADS_AT_START)
    torch.manual_seed(named_seed(frozen.seed, frozen.stage))
    attempt.ownership.require()
    output = frozen.work
    if attempt.is_first_process:
        output = start_building(frozen.store, frozen.stage, frozen.fingerprint, attempt.ownership.attempt)
        begin_with(frozen.work, chain(*inputs.values()), goes_on=checkpoint is not None)
        if record is not None:
            code.begin(frozen.work, record)
    record_hardware(attempt)
    with Tracker(frozen, attempt.ownership, checkpoint.samples_seen if checkpoint else -1) as tracker:
        context = StageContext(**vars(attempt), settings=settings, inputs=inputs, output=output, tracker=tracker)
        try:
            result: StageResult = resolve(frozen.declaration.run)(context)
            assert isinstance(result.numbers, frozen.declaration.numbers), (
                f"{frozen.kind} was declared with other numbers"
            )
        except StageLost:
            raise
        except StageInterrupted:
            # The checkpoint is written. The tracker may wait for a server, and a batch queue may not wait for it.
            attempt.process.tell_of_interruption()
            raise
        if attempt.is_first_process:
            attempt.progress.update(phase=Phase.PUBLISHING, activity="publishing")
            here_s = time.monotonic() - started
            device_s = attempt.progress.earlier_device_s + here_s * frozen.tasks.total
            _publish(context, result, Spent(elapsed_before_s + here_s, device_s), version)


def _publish(context: StageContext, result: StageResult, spent: Spent, version: str) -> None:
    frozen = context.frozen
    write_rows(frozen.work, context.output)
    if frozen.code is not None:
        shutil.copy(frozen.work / code.RECORD, context.output)
    wandb_run = context.tracker.wandb_record
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        stage=frozen.stage,
        kind=frozen.kind,
        fingerprint=frozen.fingerprint,
        identity=frozen.identity,
        inputs={name: [each.fingerprint for each in found] for name, found in frozen.inputs.items()},
        inputs_sha256=inputs_read(frozen.work),
        config=counted_settings(frozen.read_settings()),
        code_version=version,
        made_by_run=frozen.run,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        duration_s=round(spent.duration_s, 3),
        device_s=round(spent.device_s, 3),
        samples_seen=result.samples_seen,
        numbers=result.numbers.model_dump(mode="json", exclude_none=True),
        metrics=result.metrics,
        hardware=read_hardware(frozen.work),
        tracking=wandb_run.published() if wandb_run else {},
        files=describe_files(context.output),
    )
    publish(frozen.store, context.output, manifest, before_rename=context.ownership.require)
