"""Runs stages on several processes that live as long as all of them: imports, which dominate, are paid once."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from pipeline.workflow.frozen import FrozenStage, write_frozen
from tests.support import ROOT


def run_on_ranks(
    stages: Sequence[FrozenStage],
    *,
    processes: int = 2,
    timeout_s: float = 900,
    worker: str = "pipeline.training.worker",
) -> list[int]:
    """Run the stages one after the other, each on all processes, as the module `worker` does; their exit statuses."""
    paths = [str(write_frozen(stage).path) for stage in stages]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", worker, *paths],
            env={**environment, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
        )
        for rank in range(processes)
    ]
    try:
        return [process.wait(timeout=timeout_s) for process in started]
    finally:
        for process in started:
            process.kill()


def free_port() -> int:
    """One that no outgoing connection takes until the first rank listens there: those get ports from 32768 on."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", random.randrange(20000, 30000)))
            return probe.getsockname()[1]


def log_of(stage: FrozenStage) -> str:
    log = stage.work / "log.txt"
    return log.read_text() if log.exists() else "no log"
