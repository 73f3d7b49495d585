"""Work spread over processes that end when the work does, however it ends. Imports no torch."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

_ITEMS_AT_ONCE = 16
_TASKS_AHEAD = 4
"""How many tasks each process has before it, so that none waits for the one whose result is the next in order."""

_SECONDS_BETWEEN_LOOKS = 0.1

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int, look: Callable[[], None] = lambda: None
) -> Iterator[Result]:
    """The results of all items in their order, made by so many processes; by this one alone where it is 1.

    `function`, items and results can be pickled. `look` is called often while this process waits, and may raise to stop
    the work. What `function` raises is raised here, in its turn.

    Raises:
        BrokenProcessPool: one of the processes was killed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    ahead: deque[Future[list[Result]]] = deque()
    with process_pool(processes) as pool:
        while True:
            while len(ahead) < _TASKS_AHEAD * processes and (task := list(islice(remaining, _ITEMS_AT_ONCE))):
                ahead.append(pool.submit(_each, function, task))
            if not ahead:
                return
            while not ahead[0].done():
                look()
                wait([ahead[0]], timeout=_SECONDS_BETWEEN_LOOKS)
            yield from ahead.popleft().result()


@contextmanager
def process_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once where the work is stopped, with no word of their own."""
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, initializer=_leave_signals_to_the_parent)
    try:
        yield pool
    except BaseException:
        # What waits is not cancelled: a future that was would never count as done, and those of a dead process fail.
        pool.shutdown(wait=False)
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
        raise
    pool.shutdown()


def _each(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return list(map(function, items))


def _leave_signals_to_the_parent() -> None:
    """End with the parent alone: it stops the work and kills this process, or is gone, which can come without a word.

    A signal to a whole group would otherwise end this process first, and look like a failure.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
