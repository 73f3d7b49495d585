"""The cluster of the tests leaves nothing behind, however its owner ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT

OWNER = """
import subprocess, sys
program = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(program.stdout.readline().strip().removeprefix("export SLURM_CONF="), flush=True)
program.wait()
"""


def processes_of(directory: Path) -> list[str]:
    """Whatever has the cluster's directory in its command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if str(directory) in command or str(directory) in process.environ().get("SLURM_CONF", ""):
                found.append(command)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.usefixtures("programs")
def test_a_cluster_whose_owner_is_killed_ends_with_its_jobs():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(ROOT / "slurm" / "one_machine.py")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    conf = Path(owner.stdout.readline().strip())
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    submit = ["sbatch", "--output=/dev/null", "--wrap", "srun sleep 1000"]
    subprocess.run(submit, check=True, env=environment, capture_output=True)
    deadline = time.monotonic() + 180
    try:
        while not any(command.endswith("/sleep 1000") for command in processes_of(conf.parent)):
            assert time.monotonic() < deadline, "the job did not start"
            time.sleep(0.1)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    while processes_of(conf.parent) or conf.parent.exists():
        assert time.monotonic() < deadline, processes_of(conf.parent)
        time.sleep(0.1)
