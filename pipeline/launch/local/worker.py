"""A process that runs frozen stages, one after the other, so that imports are paid once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from pipeline.launch.identity import LAUNCHED_BY
from pipeline.workflow.code import search_path
from pipeline.workflow.frozen import FrozenFile
from pipeline.workflow.progress import EXIT_INTERRUPTED, LOG, Outcome, result_path


class Worker:
    """Started with its first stage. It ends when this process does, or with `close`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, LAUNCHED_BY: "local"}
        self._process: subprocess.Popen[str] | None = None
        self._frozen: FrozenFile | None = None
        self._is_asked_to_stop = False

    def begin(self, frozen: FrozenFile) -> None:
        """Begin a stage."""
        command = [sys.executable, "-m", "pipeline.training.worker"]
        frozen.stage.work.mkdir(parents=True, exist_ok=True)
        if self._frozen is not None and self._frozen.stage.code != frozen.stage.code:
            self.close()
        self._frozen = frozen
        # The processes of a stage that trains on several devices start each other, from the command of the first.
        if frozen.stage.tasks.total > 1:
            self.close()
            self._process = self._spawn([*command, str(frozen.path)], frozen)
            return
        if self._process is None or self._process.poll() is not None:
            self._process = self._spawn(command, frozen)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"frozen": str(frozen.path)}) + "\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome | None:
        """How the stage ended; None while it goes on."""
        assert self._process is not None
        assert self._frozen is not None
        status = self._process.poll()
        result = result_path(self._frozen.path, self._process.pid)
        if result.exists():
            said = result.read_bytes()
            result.unlink()
            return next((outcome for outcome in Outcome if outcome.value.encode() == said), Outcome.FAILED)
        if status is None:
            return None
        if status == 0:
            return Outcome.FINISHED
        return Outcome.INTERRUPTED if self._is_asked_to_stop or status == EXIT_INTERRUPTED else Outcome.FAILED

    @property
    def status(self) -> int | None:
        """The exit status of its process, negative where a signal ended it; None while it goes on."""
        return None if self._process is None else self._process.poll()

    def interrupt(self) -> None:
        """Ask the stage to checkpoint and stop."""
        assert self._process is not None
        self._is_asked_to_stop = True
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the stage and all of its processes, here and now."""
        assert self._process is not None
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, if there is one, once the stage that it is at is over."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _spawn(self, command: list[str], frozen: FrozenFile) -> subprocess.Popen[str]:
        log = frozen.stage.work / LOG
        code = frozen.stage.code
        path = search_path(frozen.stage.outputs, code, self._environment) if code is not None else {}
        with log.open("a") as output:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, start_new_session=True,
                env={**self._environment, **path},
            )  # fmt: skip
