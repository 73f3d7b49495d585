"""A stage's log on the terminal."""

import time
from collections import deque
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.5


def show_log(log: Path, lines: int, follow: bool) -> None:
    """Print a log, or its last `lines`; with `follow` go on as it grows."""
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines) if lines else file:
            print(line, end="")
        while follow:
            line = file.readline()
            if line:
                print(line, end="", flush=True)
            else:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
