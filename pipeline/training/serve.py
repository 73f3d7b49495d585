"""What a worker process does (`pipeline.training.worker`).

Given paths of frozen stages, it runs them, and its exit status says how the last one ended. Without arguments it reads
paths from standard input, one JSON line each, and keeps its imports between them. It ends when its input ends, or after
a stage that it answers by its exit status.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch.identity import this_process
from pipeline.training.stage import run_stage
from pipeline.training.worker import EXIT_KILLED
from pipeline.workflow.frozen import FrozenStage, read_frozen
from pipeline.workflow.notify import tell_of_end
from pipeline.workflow.progress import EXIT_INTERRUPTED, LOG, Failure, Outcome, result_path, write_failure

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_SAY_WHY = 5.0
EXIT_STATUS = {Outcome.FINISHED: 0, Outcome.REUSED: 0, Outcome.FAILED: 1, Outcome.INTERRUPTED: EXIT_INTERRUPTED}


def serve(interruption: threading.Event) -> int:
    """Run the stages that are asked for; the exit status tells how the last one ended. Set the event to stop it."""
    process = this_process()
    if not process.is_first and process.world_size is None:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    elif process.stops_with_parent:
        threading.Thread(target=_stop_with_parent, args=(os.getppid(), interruption), daemon=True).start()
    outcome = Outcome.FINISHED
    for path in _paths():
        try:
            frozen = read_frozen(path)
        except UserError as error:
            print(error, flush=True)
            write_failure(path.parent.parent, Failure(str(error), is_user_error=True))
            return EXIT_STATUS[Outcome.FAILED]
        _log_to(frozen)
        outcome = run_stage(frozen, interruption)
        if outcome is Outcome.FINISHED and process.is_first and process.world_size is not None:
            tell_of_end(frozen)  # a queue has nobody who waits for all
        if len(sys.argv) == 1 and "deepspeed" in sys.modules:
            # Its engine stays in memory, on the device that the next stage needs whole: a new process runs that.
            break
        if len(sys.argv) == 1:
            _answer(path, outcome)
        if interruption.is_set() or (len(sys.argv) > 1 and outcome is Outcome.FAILED):
            break
    if outcome is Outcome.INTERRUPTED and (process.tell_of_interruption() or not process.is_first):
        # The first process tells how it ended. Where a status other than 0 has the others killed, a status of another
        # one would catch it in the middle of its checkpoint, and its own would be lost among theirs.
        return 0
    return EXIT_STATUS[outcome]


def _paths() -> Iterator[Path]:
    if len(sys.argv) > 1:
        yield from map(Path, sys.argv[1:])
        return
    for line in sys.stdin:
        yield Path(json.loads(line)["frozen"])


def _stop_with_parent(parent: int, interruption: threading.Event) -> None:
    """Checkpoint and stop when the process that asks for stages is gone, so that nothing trains unseen."""
    while not interruption.wait(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != parent:
            interruption.set()


def _end_with_parent(parent: int) -> None:
    """End soon after the first process, which started this one: this one may be waiting for it in a collective."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    time.sleep(SECONDS_TO_SAY_WHY)
    os._exit(EXIT_KILLED)


def _log_to(frozen: FrozenStage) -> None:
    """Send this process's output, that of libraries and of child processes too, to the stage's log."""
    frozen.work.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with (frozen.work / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())


def _answer(frozen: Path, outcome: Outcome) -> None:
    target = result_path(frozen, os.getpid())
    temporary = target.with_suffix(".tmp")
    temporary.write_text(outcome.value)
    temporary.replace(target)
