"""What holds for all tests."""

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what is skipped for want of anything but a GPU, where UNCLIP_REQUIRE_ALL is set, as CI does."""
    report = yield
    if report.skipped and os.environ.get("UNCLIP_REQUIRE_ALL") and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which UNCLIP_REQUIRE_ALL forbids: {report.longrepr}"
    return report
