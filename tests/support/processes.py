"""The processes that a test's own work starts, and those of jobs."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
"""Version 1 alone has it."""

_TAKES_MEMORY_UNTIL_ANOTHER_PROCESS_IS_KILLED = """
import os, sys
root, cgroup, victim = sys.argv[1:]
def has_memory():
    try:
        return not open(f"/proc/{victim}/statm").read().startswith("0 ")
    except OSError:
        return False
open(f"/proc/{victim}/oom_score_adj", "w").write("1000")
try:
    # The kernel may look again before the memory of the other one is free.
    open("/proc/self/oom_score_adj", "w").write("-1000")
except PermissionError:
    pass
open(f"{root}{cgroup}/cgroup.procs", "w").write(str(os.getpid()))
taken = []
while has_memory():
    taken.append(b"1" * (4 << 20))
open(f"{root}/cgroup.procs", "w").write(str(os.getpid()))  # or Slurm could not remove it, nor start there again
os._exit(0)
"""


@contextmanager
def no_process_left(within_s: float = 30.0) -> Iterator[None]:
    """Every process that is started inside has ended soon after it. Those of other tests may be there before."""
    before = multiprocessing.active_children()
    yield
    limit = time.monotonic() + within_s
    while started := [each for each in started_since(before) if each.is_alive()]:
        assert time.monotonic() < limit, started
        time.sleep(0.01)


def started_since(before: list[BaseProcess]) -> list[BaseProcess]:
    """The children of this process that were not there before."""
    return [each for each in multiprocessing.active_children() if each not in before]


def exhaust_memory_limit(pid: int) -> bool:
    """Fill the memory that Slurm allows a job's step, until the kernel has killed that process of it.

    False where Slurm sets no limit.
    """
    groups = (line.split(":") for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines())
    own = next((path for _, controllers, path in groups if controllers == "memory"), "")
    if not own.startswith("/slurm_"):
        return False
    program = [sys.executable, "-c", _TAKES_MEMORY_UNTIL_ANOTHER_PROCESS_IS_KILLED]
    return subprocess.run([*program, str(MEMORY_CGROUP), own, str(pid)], check=False).returncode == 0
