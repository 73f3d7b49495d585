"""A stage's log on the terminal."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_SECONDS_BETWEEN_LOOKS = 0.5


def show_log(log: Path, lines: int, goes_on: Callable[[], bool]) -> None:
    """Print a log, or its last `lines`; and go on as it grows, for as long as it is said to."""
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines) if lines else file:
            print(line, end="")
        while goes_on():
            _print_rest(file)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        _print_rest(file)


def _print_rest(file: TextIO) -> None:
    while line := file.readline():
        print(line, end="", flush=True)
