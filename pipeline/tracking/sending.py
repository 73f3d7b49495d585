"""Starts the process that sends to W&B, and ends it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

from pipeline.tracking.wandb_run import Ending
from pipeline.workflow.frozen import FrozenStage

_SECONDS_TO_UPLOAD_AT_A_STOP = 10.0
_SECONDS_TO_UPLOAD_THE_REST = 60.0
_SECONDS_BETWEEN_STARTS = 60.0


class Sending:
    """Sends the record of a stage while it works. Nothing that W&B does or fails to do stops or delays training."""

    def __init__(self, frozen: FrozenStage) -> None:
        self._frozen = frozen
        self._process = start_sender(frozen)
        self._started_at = time.monotonic()

    def keep_up(self) -> None:
        """Start the process again, now and then, where something ended it."""
        if self._process.poll() is not None and time.monotonic() - self._started_at > _SECONDS_BETWEEN_STARTS:
            self._process = start_sender(self._frozen)
            self._started_at = time.monotonic()

    def finish(self, ending: Ending) -> None:
        """Say how the stage ended, and wait some time for the server to have everything: little at a stop."""
        if self._process.poll() is None:
            _tell(self._process, ending)
        else:
            self._process = start_sender(self._frozen, ending)
        is_stop = ending is Ending.INTERRUPTED  # under Slurm there is little time until the job is killed
        if not has_all(self._process, _SECONDS_TO_UPLOAD_AT_A_STOP if is_stop else _SECONDS_TO_UPLOAD_THE_REST):
            print(
                "warning: W&B: not all of it was uploaded; "
                f"it is kept in {self._frozen.work}, and `unclip sync` sends what is missing",
                flush=True,
            )

    def abandon(self) -> None:
        """End the process, and W&B's below it, at once and without a word to the server."""
        has_all(self._process, 0.0)


def start_sender(
    frozen: FrozenStage, ending: Ending | None = None, output: IO[str] | None = None
) -> "subprocess.Popen[str]":
    """The process, in a session of its own; `ending` where the stage is not at work. It prints to `output`."""
    # A W&B service of whoever started this process would outlive it, and hold the id of its run.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.tracking.sender", str(os.getpid()), *([ending] if ending else [])],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        text=True,
        env=environment,
        start_new_session=True,
    )
    _tell(process, frozen.model_dump_json())
    return process


def has_all(process: "subprocess.Popen[str]", seconds: float) -> bool:
    """Whether the server has all of the record within that time; after it, the process and W&B's are ended."""
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def _tell(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # it is gone: its exit status tells
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
