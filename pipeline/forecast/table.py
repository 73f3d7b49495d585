"""A forecast in a terminal."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import RenderableType

from pipeline.forecast.estimate import Forecast, StageForecast
from pipeline.terminal.tables import new_table
from pipeline.terminal.words import format_bytes, format_duration
from pipeline.workflow.plan import Action

UNKNOWN = "?"
Number = TypeVar("Number", int, float)


def forecast_lines(run: str, forecast: Forecast) -> Iterator[RenderableType]:
    """The table, then what is to be said of each stage, of the disk, and of the sum."""
    target = forecast.target
    to_do = [stage for stage in forecast.stages if stage.action is not Action.REUSE]
    if to_do:
        cells = {stage.name: _cells(stage, target.price_per_hour) for stage in to_do}
        table = new_table(f"forecast of run {run} on {target.name}", "stage", *cells[to_do[0].name], wraps=True)
        for name, values in cells.items():
            table.add_row(name, *values.values())
        yield table
    for stage in forecast.stages:
        for note in stage.notes:
            yield f"{stage.name}: {note}"
        if (slow := _too_slow(stage)) is not None:
            yield f"{stage.name}: {slow}"
    yield from _sums(forecast)


def _cells(stage: StageForecast, price_per_hour: float | None) -> dict[str, str]:
    """By the column's title."""
    hours = stage.device_hours
    cost = (
        {} if price_per_hour is None else {"cost": _or_unknown(hours, lambda hours: f"{hours * price_per_hour:,.2f}")}
    )
    return {
        "samples": _or_unknown(stage.samples, lambda count: f"{count:,}"),
        "GFLOP\neach": _or_unknown(stage.flops_per_sample, lambda count: _short(count / 1e9)),
        "memory": _or_unknown(stage.memory_bytes, format_bytes),
        "samples\n/s": _or_unknown(stage.samples_per_s, _short),
        "time": _or_unknown(stage.duration_s, format_duration),
        **cost,
        "shards\n/s": _or_unknown(stage.shards_per_s, _short),
        "artifact": _or_unknown(stage.artifact_bytes, format_bytes),
        "check-\npoints": _or_unknown(stage.work_bytes, format_bytes),
    }


def _or_unknown(value: Number | None, shown: Callable[[Number], str]) -> str:
    return UNKNOWN if value is None else shown(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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
