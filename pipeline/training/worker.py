"""The process that runs stages: `python -m pipeline.training.worker FROZEN ...`; `pipeline.training.serve` says how.

Its signals are taken care of before anything else is imported: torch alone takes seconds.
"""

import os
import signal
import sys
import threading
from pathlib import Path

EXIT_KILLED = 128 + signal.SIGINT


def main() -> int:
    """Note signals from here on, import the rest, and run what is asked for."""
    interruption = threading.Event()
    # Blocked, which children inherit: a signal to all processes of a Slurm step ends none of them. A thread takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=_wait_for_signal, args=(interruption,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: interruption.set())
    signal.signal(signal.SIGINT, lambda *_: _interrupt(interruption))

    from pipeline.workflow.code import become_submitted

    for path in sys.argv[1:2]:
        become_submitted(Path(path))

    from pipeline.training.serve import serve

    return serve(interruption)


def _wait_for_signal(interruption: threading.Event) -> None:
    signal.sigwait({signal.SIGUSR1})
    interruption.set()


def _interrupt(interruption: threading.Event) -> None:
    """Ask for a checkpoint and a stop; asked a second time, stop here and now."""
    if interruption.is_set():
        os._exit(EXIT_KILLED)
    interruption.set()


if __name__ == "__main__":
    sys.exit(main())
