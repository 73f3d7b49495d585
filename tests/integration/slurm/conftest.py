"""A real two-node Slurm cluster for the tests of this folder; it ends with this process, however that ends."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def programs() -> None:
    """Skips the tests on a machine without Slurm."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        message = f"{', '.join(missing)} are missing; sudo apt-get install -y {PACKAGES} brings them"
        pytest.skip(message)


@pytest.fixture(scope="session")
def slurm_conf(programs: None) -> Iterator[str]:
    """The configuration of a cluster that runs."""
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "slurm" / "one_machine.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdin is not None
    assert program.stdout is not None
    ready = program.stdout.readline()
    assert ready.startswith("export SLURM_CONF="), "the cluster did not start"
    yield ready.strip().removeprefix("export SLURM_CONF=")
    program.stdin.close()
    program.wait(timeout=60)


@pytest.fixture
def cluster(slurm_conf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Slurm command of the test and of its children speaks to the cluster, whose jobs find the tests' modules."""
    monkeypatch.setenv("SLURM_CONF", slurm_conf)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
