"""Durations, sizes and progress in words."""

from pipeline.workflow.progress import Progress


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


def progress_line(progress: Progress) -> str:
    """What is known of a stage in progress, in one line."""
    if progress.max_samples <= 0:
        return progress.activity or progress.phase.value
    parts = [f"{progress.samples_seen:,} / {progress.max_samples:,} samples"]
    if progress.samples_per_s > 0:
        parts.append(f"{progress.samples_per_s:,.0f} samples/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.time_left_s is not None and progress.phase.value == "working":
        parts.append(f"{format_duration(progress.time_left_s)} left")
    if progress.activity:
        parts.append(progress.activity)
    return " · ".join(parts)
