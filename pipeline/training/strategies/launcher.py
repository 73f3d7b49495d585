"""Starts a stage's other processes, and ends all where one of them dies."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_fabric.plugins.environments import ClusterEnvironment
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from pipeline.errors import ProcessKilledError, StageInterrupted, UserError

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_NOTICE = 3.0
SECONDS_TO_FAIL_BY_ITSELF = 10.0


class StageLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which also watches the processes. If one dies, the reason becomes the stage's failure.

    Lightning's own watch would kill all processes, the first one too, before the reason is written down.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        report: Callable[[str], object],
    ) -> None:
        """`report` keeps the line that says which process died, where this one hangs and cannot end by itself."""
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._report = report
        self._is_over = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the others, then call the function here.

        Raises `ProcessKilledError` where it failed in the wake of another process, which a signal ended.
        """
        if self.cluster_environment.creates_processes_externally:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self.end_watch()
            may_be_in_its_wake = isinstance(error, Exception) and not isinstance(error, UserError | StageInterrupted)
            died = self._first_death(SECONDS_TO_NOTICE) if may_be_in_its_wake else None
            if died is not None:
                raise ProcessKilledError(died) from error
            raise

    def end_watch(self) -> None:
        """Stop watching: the other processes are not needed any more."""
        self._is_over.set()

    def _first_death(self, within_s: float) -> str | None:
        """One line that says which process a signal killed; None if none was. One that failed has said why."""
        until = time.monotonic() + within_s
        while True:
            for rank, process in enumerate(self.procs, start=1):
                if (process.poll() or 0) < 0:
                    return self._line(rank, process)
            if time.monotonic() > until:
                return None
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _line(self, rank: int, process: "subprocess.Popen[bytes]") -> str:
        killer = signal.Signals(-process.returncode)
        hint = "; a machine that runs out of memory ends processes so" if killer is signal.SIGKILL else ""
        return f"process {rank} of {self.num_processes} was ended by {killer.name}{hint}: run again to go on"

    def _watch(self) -> None:
        """End this process when another one has died: it may be waiting for that one in a collective for ever."""
        while all(not process.poll() for process in self.procs):
            if self._is_over.wait(SECONDS_BETWEEN_LOOKS):
                return
        if self._is_over.wait(SECONDS_TO_FAIL_BY_ITSELF):
            return
        died = self._first_death(0.0)
        if died is not None:
            self._report(died)
        self.kill(signal.SIGKILL)
        os._exit(1)
