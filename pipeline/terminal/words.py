"""Durations, sizes, members and progress in words."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from pipeline.workflow.progress import Phase, Progress

_LONGEST_LIST = 4


def format_duration(seconds: float) -> str:
    """`8 s`, `2:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(count: float) -> str:
    """Bytes in words, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers in few words, as Slurm has them: `0-3`, `5`."""
    placed = enumerate(sorted(numbers))
    runs = [[number for _, number in run] for _, run in groupby(placed, lambda each: each[1] - each[0])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def listed(values: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    values = list(values)
    more = f" +{len(values) - _LONGEST_LIST}" if len(values) > _LONGEST_LIST else ""
    return f"{', '.join(values[:_LONGEST_LIST])}{more}"


def members_shown(members: Sequence[str]) -> str:
    """The members of a sweep by their numbers, `0-5, 7`; others by their names."""
    sweeps, numbers = {name.rpartition(".")[0] for name in members}, [name.rpartition(".")[2] for name in members]
    if len(sweeps) > 1 or not all(number.isdigit() for number in numbers):
        return listed(members)
    return listed(ranges(map(int, numbers)))


def progress_line(progress: Progress) -> str:
    """What is known of a stage in progress, in one line."""
    activity = "" if progress.phase in (Phase.INTERRUPTED, Phase.FAILED) else progress.activity
    if progress.max_samples <= 0:
        return activity or progress.phase.value
    parts = [f"{progress.samples_seen:,} / {progress.max_samples:,} samples"]
    if progress.samples_per_s > 0:
        parts.append(f"{progress.samples_per_s:,.0f} samples/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.time_left_s is not None and progress.phase.value == "working":
        parts.append(f"{format_duration(progress.time_left_s)} left")
    if activity:
        parts.append(activity)
    return " · ".join(parts)
