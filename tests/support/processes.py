"""The processes that a test's own work starts."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess


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
