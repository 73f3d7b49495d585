"""The process that sends a stage's record to W&B: `python -m pipeline.tracking.sender`, started by `sending`.

W&B's client has processes and threads of its own, waits for servers, and may hang as it ends: here it cannot disturb
training. Standard input has the frozen stage in one line of JSON, and in a second one how the start of the stage ended,
unless the command line says that. The exit status is 0 once the server has all of the record.
"""

import contextlib
import os
import signal
import sys
import threading
import time

from pipeline.tracking.wandb_run import Ending, WandbRun, said_by
from pipeline.workflow.frozen import FrozenStage

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_TRIES = 30.0


def main() -> int:
    """Send until the stage has ended. Once it has, a server that is not reached is not waited for."""
    # Slurm signals all processes of a job, and this one ends when the stage does.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    pid, *known = sys.argv[1:]
    owner = Owner(int(pid), Ending(known[0]) if known else None)
    frozen = FrozenStage.model_validate_json(owner.first_line)
    warned_of: set[str] = set()
    while True:
        ending, run = owner.wait(0.0), None
        try:
            run = WandbRun(frozen, ending)
            _send_until_the_end(run, owner)
            return 0
        except (Exception, SystemExit) as error:  # W&B's client asks for an exit where its process is gone
            said = said_by(error)
            if said not in warned_of:
                warned_of.add(said)
                state = "not reached" if run is None else "interrupted"
                print(f"warning: W&B: {state} ({said}); rows are kept and sent later", flush=True)
            _forget_session()
        # A run that was open may have lost its process to the signal that ended the stage: it gets another try.
        if ending or (run is None and owner.wait(0.0)):
            return 1
        owner.wait(_SECONDS_BETWEEN_TRIES)


class Owner:
    """The process that started this one. Where it is gone, this one ends at once, with W&B's."""

    def __init__(self, pid: int, ending: Ending | None) -> None:
        self.first_line = sys.stdin.readline()
        self._pid = pid
        self._has_ended = threading.Event()
        self._ending = ending
        if ending is not None:
            self._has_ended.set()
        for act in (self._watch, self._listen)[: 2 if ending is None else 1]:
            threading.Thread(target=act, daemon=True).start()

    def wait(self, seconds: float) -> Ending | None:
        """How the stage ended, as soon as it is known; None where it is not known by then."""
        self._has_ended.wait(seconds)
        return self._ending

    def _listen(self) -> None:
        line = sys.stdin.readline()
        if not line:
            _end_at_once()
        self._ending = Ending(line.strip())
        self._has_ended.set()

    def _watch(self) -> None:
        while os.getppid() == self._pid:
            time.sleep(_SECONDS_BETWEEN_LOOKS / 5)
        _end_at_once()


def _send_until_the_end(run: WandbRun, owner: Owner) -> None:
    ending = None
    while ending is None:
        ending = owner.wait(_SECONDS_BETWEEN_LOOKS)
        run.send()
    run.finish(ending)


def _end_at_once() -> None:
    """As a kill would: the next start of the stage asks the server what it has, and nothing may arrive after that."""
    os.killpg(0, signal.SIGKILL)


def _forget_session() -> None:
    import wandb

    # Where W&B's process did not end by itself this raises, or asks this one to exit; it is forgotten all the same.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


if __name__ == "__main__":
    sys.exit(main())
