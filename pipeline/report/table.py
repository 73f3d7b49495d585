"""The table of a comparison: a row for each run, columns of state, time, cost and final metrics, the best marked."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pydantic_core import to_jsonable_python

from pipeline.errors import UserError
from pipeline.report.differences import differing_settings
from pipeline.report.evaluations import evaluation_tables
from pipeline.report.metrics import directions, finite, format_number, is_bound
from pipeline.report.records import Comparison, RunReport, StageReport
from pipeline.terminal.words import format_duration
from pipeline.workflow.declaration import Better

HEADLINES = 4


class Quantity(StrEnum):
    """What a column holds."""

    STATE = "state"
    TIME = "time_s"
    COST = "device_hours"
    SAMPLES = "samples_seen"
    METRIC = "metric"


@dataclass(frozen=True)
class Cell:
    """One value of one run; `shared_with` are the other runs with the same stage, `low` and `high` its interval."""

    value: float | None
    text: str
    is_best: bool = False
    shared_with: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Column:
    """`key` is `stage.metric`, or `stage.time_s` and the like. `is_headline`: among a stage's first columns."""

    key: str
    stage: str
    title: str
    quantity: Quantity
    better: Better | None
    is_headline: bool
    cells: tuple[Cell, ...]

    @property
    def has_interval(self) -> bool:
        """Whether some run has an interval beside the value."""
        return any(cell.low is not None for cell in self.cells)


@dataclass(frozen=True)
class Totals:
    """Time and cost of all compared stages; one that several runs share is counted once."""

    duration_s: float
    device_hours: float
    shared_stages: int


def totals(stages: Sequence[StageReport], comparison: Comparison) -> Totals:
    """Sums over distinct stages, those included that other runs share."""
    distinct = {stage.fingerprint: stage for stage in stages}.values()
    return Totals(
        sum(stage.duration_s or 0.0 for stage in distinct),
        sum(stage.device_hours or 0.0 for stage in distinct),
        sum(len(comparison.users[stage.fingerprint]) > 1 for stage in distinct),
    )


def columns(comparison: Comparison) -> list[Column]:
    """Every column, stage by stage in workflow order."""
    better = directions(comparison)
    return [column for name in comparison.stage_names for column in _stage_columns(comparison, name, better)]


def named_columns(found: Sequence[Column], keys: Sequence[str]) -> list[Column]:
    """The columns of those keys. Raises `UserError` that lists all there are."""
    by_key = {column.key: column for column in found}
    unknown = next((key for key in keys if key not in by_key), None)
    if unknown is not None:
        known = ", ".join(by_key) or "none, as no stage has begun"
        raise UserError(f"--metric {unknown!r} is no column of these runs; there are {known}")
    return [by_key[key] for key in keys]


def table_csv(comparison: Comparison) -> str:
    """One row for each run: name, group, state, what differs, and all columns by their keys.

    A metric's interval follows it, as `stage.metric_low` and `stage.metric_high`.
    """
    differences = differing_settings([run.record for run in comparison.runs])
    found = columns(comparison)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    costs = ["total.time_s", "total.device_hours"]
    writer.writerow(
        ["run", "group", "state", *differences, *costs, *(key for column in found for key in _csv_keys(column))]
    )
    for number, run in enumerate(comparison.runs):
        cost = totals(run.stages, comparison)
        settings = [values[number] for values in differences.values()]
        values = [value for column in found for value in _csv_values(column, column.cells[number])]
        row = [run.name, run.record.group, run.state.value, *settings, cost.duration_s, cost.device_hours, *values]
        writer.writerow(row)
    return file.getvalue()


def _csv_keys(column: Column) -> list[str]:
    return [column.key, f"{column.key}_low", f"{column.key}_high"] if column.has_interval else [column.key]


def _csv_values(column: Column, cell: Cell) -> list[str]:
    value = cell.text if cell.value is None else repr(cell.value)
    ends = ["" if end is None else repr(end) for end in (cell.low, cell.high)]
    return [value, *ends] if column.has_interval else [value]


def table_json(comparison: Comparison) -> str:
    """All that the table shows, run by run and stage by stage; null for nan and the infinities, which JSON lacks."""
    differences = differing_settings([run.record for run in comparison.runs])
    everything = totals(comparison.distinct_stages, comparison)
    better = directions(comparison)
    runs = []
    for number, run in enumerate(comparison.runs):
        cost = totals(run.stages, comparison)
        runs.append({
            "name": run.name,
            "group": run.record.group,
            "state": run.state.value,
            "started_at": run.record.started_at,
            "overrides": run.record.overrides,
            "differences": {key: values[number] for key, values in differences.items()},
            "duration_s": cost.duration_s,
            "device_hours": cost.device_hours,
            "stages": {stage.name: _stage_json(comparison, run, stage) for stage in run.stages},
        })  # fmt: skip
    total = {"duration_s": everything.duration_s, "device_hours": everything.device_hours}
    evaluations = evaluation_tables(comparison.outputs, [run.name for run in comparison.runs])
    content = {"runs": runs, "total_shared_once": total, "better": better, "evaluations": evaluations}
    return (
        json.dumps(to_jsonable_python(content, inf_nan_mode="null"), indent=2, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


_STAGE_IN_JSON = (
    "state",
    "detail",
    "fingerprint",
    "duration_s",
    "devices",
    "device_hours",
    "samples_seen",
    "hardware",
    "metrics",
)


def _stage_json(comparison: Comparison, run: RunReport, stage: StageReport) -> dict[str, Any]:
    made_by_run = stage.artifact.manifest.made_by_run if stage.artifact else None
    shared = {"made_by_run": made_by_run, "shared_with": comparison.shared_with(run, stage)}
    return {name: getattr(stage, name) for name in _STAGE_IN_JSON} | shared


def _stage_columns(comparison: Comparison, name: str, better: dict[str, Better]) -> list[Column]:
    metrics = dict.fromkeys(
        metric
        for run in comparison.runs
        if (stage := run.stage(name))
        for metric in stage.metrics
        if not is_bound(metric, stage.metrics)
    )
    found = []
    for quantity in (Quantity.STATE, Quantity.TIME, Quantity.COST, Quantity.SAMPLES):
        is_cost = quantity in (Quantity.TIME, Quantity.COST)
        direction = Better.LOW if is_cost else None
        found.append(_column(comparison, name, quantity, quantity.value, direction, is_headline=is_cost))
    for place, metric in enumerate(metrics):
        direction = better.get(f"{name}.{metric}")
        found.append(_column(comparison, name, Quantity.METRIC, metric, direction, is_headline=place < HEADLINES))
    return found


def _column(
    comparison: Comparison, name: str, quantity: Quantity, measure: str, better: Better | None, *, is_headline: bool
) -> Column:
    """A column with its best marked: of finished stages with a finite number, and only where they are not all alike.

    `measure` is the metric's name, or the quantity's.
    """
    cells = [_cell(comparison, run, name, quantity, measure) for run in comparison.runs]
    finished = [stage is not None and stage.is_finished for stage in (run.stage(name) for run in comparison.runs)]
    ready = {finite(cell.value) for cell, is_ready in zip(cells, finished, strict=True) if is_ready} - {None}
    if better is not None and len(ready) > 1:
        best = (min if better is Better.LOW else max)(value for value in ready if value is not None)
        cells = [
            replace(cell, is_best=is_ready and cell.value == best)
            for cell, is_ready in zip(cells, finished, strict=True)
        ]
    title = measure if quantity is Quantity.METRIC else measure.removesuffix("_s").replace("_", " ")
    return Column(f"{name}.{measure}", name, title, quantity, better, is_headline, tuple(cells))


def _cell(comparison: Comparison, run: RunReport, name: str, quantity: Quantity, measure: str) -> Cell:
    stage = run.stage(name)
    if stage is None or (quantity is Quantity.METRIC and measure not in stage.metrics):
        return Cell(None, "")
    shared = tuple(comparison.shared_with(run, stage))
    match quantity:
        case Quantity.STATE:
            return Cell(None, stage.state.value, shared_with=shared)
        case Quantity.TIME:
            text = "" if stage.duration_s is None else format_duration(stage.duration_s)
            return Cell(stage.duration_s, text, shared_with=shared)
        case Quantity.COST:
            return Cell(stage.device_hours, format_hours(stage.device_hours), shared_with=shared)
        case Quantity.SAMPLES:
            return Cell(float(stage.samples_seen), f"{stage.samples_seen:,}", shared_with=shared)
        case Quantity.METRIC:
            value = stage.metrics[measure]
            is_interval = is_bound(f"{measure}_low", stage.metrics)
            low, high = (stage.metrics[f"{measure}_{end}"] if is_interval else None for end in ("low", "high"))
            return Cell(value, format_number(value), shared_with=shared, low=low, high=high)


def format_hours(hours: float | None) -> str:
    """Hours, to the fourth decimal at the most."""
    return "" if hours is None else format_number(round(hours, 4))
