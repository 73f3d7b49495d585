"""What holds for all tests."""

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

SLURM = "tests/integration/slurm"
LONGEST = (
    SLURM,
    "tests/integration/test_workflows.py",
    "tests/integration",
    "tests/test_extending.py",
    "tests/pipeline/tracking",
    "tests/pipeline/training",
)
"""What takes longest comes first, so that no process is left with it when the others are done."""


def pytest_configure() -> None:
    """Take Ctrl-C as a foreground process does: what a shell starts in the background ignores it, and so do its own."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file: what takes longest, then the others."""
    items.sort(key=lambda item: _rank(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling":
    """Keep a file's tests, which share fixtures, on one process, and all of Slurm's, which share a cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SLURM if nodeid.startswith(f"{SLURM}/") else nodeid.partition("::")[0]

    return ByFile(config, log)


def _rank(file: Path) -> int:
    return next((rank for rank, place in enumerate(LONGEST) if file.is_relative_to(ROOT / place)), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what is skipped for want of anything but a GPU, where UNCLIP_REQUIRE_ALL is set, as CI does."""
    report = yield
    if report.skipped and os.environ.get("UNCLIP_REQUIRE_ALL") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which UNCLIP_REQUIRE_ALL forbids: {report.longrepr}"
    return report
