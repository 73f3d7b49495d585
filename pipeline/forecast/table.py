"""A forecast in a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType

from pipeline.forecast.estimate import Forecast, StageForecast
from pipeline.terminal.tables import new_table
from pipeline.terminal.words import format_bytes, format_duration
from pipeline.workflow.plan import Action

UNKNOWN = "unknown"
_COLUMNS = (
    "stage",
    "samples",
    "GFLOP each",
    "memory",
    "samples/s",
    "time",
    "cost",
    "shards/s",
    "artifact",
    "checkpoints",
)


def forecast_lines(run: str, forecast: Forecast) -> Iterator[RenderableType]:
    """The table, then what is to be said of each stage, of the disk, and of the sum."""
    target = forecast.target
    table = new_table(
        f"forecast of run {run} on {target.name}",
        *_COLUMNS,
    )
    for stage in forecast.stages:
        table.add_row(stage.name, *_cells(stage, target.price_per_hour))
    yield table
    for stage in forecast.stages:
        for note in stage.notes:
            yield f"{stage.name}: {note}"
        if (slow := _too_slow(stage)) is not None:
            yield f"{stage.name}: {slow}"
    yield from _sums(forecast)


def _cells(stage: StageForecast, price_per_hour: float | None) -> Iterator[str]:
    if stage.action is Action.REUSE:
        yield "finished"
        yield from [""] * 8
        return
    yield UNKNOWN if stage.samples is None else f"{stage.samples:,}"
    yield UNKNOWN if stage.flops_per_sample is None else f"{stage.flops_per_sample / 1e9:,.3g}"
    yield UNKNOWN if stage.memory_bytes is None else format_bytes(stage.memory_bytes)
    yield UNKNOWN if stage.samples_per_s is None else f"{stage.samples_per_s:,.3g}"
    yield UNKNOWN if stage.duration_s is None else format_duration(stage.duration_s)
    hours = stage.device_hours
    yield UNKNOWN if hours is None or price_per_hour is None else f"{hours * price_per_hour:,.2f}"
    yield UNKNOWN if stage.shards_per_s is None else f"{stage.shards_per_s:,.3g}"
    yield UNKNOWN if stage.artifact_bytes is None else format_bytes(stage.artifact_bytes)
    yield UNKNOWN if stage.work_bytes is None else format_bytes(stage.work_bytes)


def _too_slow(stage: StageForecast) -> str | None:
    if stage.loader_per_s is None or stage.samples_per_s is None or stage.loader_per_s >= stage.samples_per_s:
        return None
    return (
        f"reads {stage.samples_per_s:,.0f} pictures/s and its loader, on cores like these, {stage.loader_per_s:,.0f}; "
        f"raise stage.{stage.name}.trainer.loader_workers, or let trainer.cache_mib hold the pictures"
    )


def _sums(forecast: Forecast) -> Iterator[str]:
    left = [each for each in forecast.stages if each.action is not Action.REUSE]
    known = [each for each in left if each.duration_s is not None]
    unknown = [each.name for each in left if each.duration_s is None]
    hours = sum(each.device_hours or 0.0 for each in known)
    price = forecast.target.price_per_hour
    cost = f"cost {hours * price:,.2f}" if price is not None else "cost unknown: set forecast.price_per_hour"
    duration = format_duration(sum(each.duration_s or 0.0 for each in known))
    line = f"one after the other: {duration}, {hours:,.3g} device hours, {cost}"
    yield line + (f"; without {', '.join(unknown)}, unknown" if unknown else "")
    without = f" and what is unknown of {', '.join(forecast.unknown_sizes)}" if forecast.unknown_sizes else ""
    free = f"{format_bytes(forecast.free_bytes)} free at {forecast.outputs}"
    needs = f"on disk: {format_bytes(forecast.needed_bytes)}{without}; {free}"
    if forecast.needed_bytes > forecast.free_bytes:
        yield f"{needs}: NOT ENOUGH; free some, or set paths.outputs"
    else:
        yield needs
