"""A stage's log on the terminal."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.5


def show_log(log: Path, lines: int, goes_on: Callable[[], bool] | None = None) -> None:
    """Print a log, or its last `lines`; and go on as it grows, for as long as it is said to."""
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines) if lines else file:
            print(line, end="")
        is_last = goes_on is None
        while True:
            while line := file.readline():
                print(line, end="", flush=True)
            if is_last or goes_on is None:
                return
            is_last = not goes_on()  # what was written until then is still to be read
            time.sleep(0 if is_last else _SECONDS_BETWEEN_LOOKS)
