import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from pipeline.data.pool import in_order
from pipeline.errors import UserError
from tests.support.processes import no_process_left


def slow_at_first(number: int) -> int:
    time.sleep(0.05 if number < 4 else 0)
    return number * number


def refuse_seven(number: int) -> int:
    if number == 7:
        raise UserError("7 is refused; use 8")
    return number


def die_at_seven(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_long(number: int) -> int:
    time.sleep(60)
    return number


def shrug_signals_off(number: int) -> int:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), each)
    return number


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(processes: int):
    assert list(in_order(slow_at_first, range(100), processes)) == [number * number for number in range(100)]
    assert list(in_order(slow_at_first, [], processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_what_an_item_raises_is_raised_here_in_its_words(processes: int):
    with no_process_left(), pytest.raises(UserError) as caught:
        list(in_order(refuse_seven, range(100), processes))
    assert str(caught.value) == "7 is refused; use 8"


def test_a_process_that_is_killed_breaks_the_work():
    with pytest.raises(BrokenProcessPool):
        list(in_order(die_at_seven, range(1000), 2))


def test_signals_are_the_parent_s_alone():
    assert list(in_order(shrug_signals_off, range(3), 2)) == [0, 1, 2]


def test_the_work_stops_at_once_where_looking_raises():
    began = time.monotonic()

    def look() -> None:
        if time.monotonic() - began > 0.3:
            raise InterruptedError

    with no_process_left(), pytest.raises(InterruptedError):
        list(in_order(sleep_long, range(100), 2, look))
    assert time.monotonic() - began < 50
