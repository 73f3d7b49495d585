"""The comparison in a terminal: a row for each run, as many columns as fit."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.differences import differing_overrides, differing_settings
from pipeline.report.evaluations import EvaluationTable, evaluation_tables
from pipeline.report.metrics import format_interval, format_number
from pipeline.report.records import Comparison, State
from pipeline.report.sweep import Effect, Level, best_levels, directions_of_effects, effects, settings, short_key
from pipeline.report.table import Column, Quantity, columns, format_hours, named_columns, totals
from pipeline.terminal.words import format_duration

_BORDER = 3
_LONGEST_VALUE = 16
_SHOWN_DIFFERENCES = 3
_BEST = "*"


@dataclass(frozen=True)
class _Shown:
    """A column as text: its heading's lines, a value for each run, and the foot."""

    heading: str
    values: tuple[str, ...]
    foot: str = ""
    is_number: bool = False

    @property
    def width(self) -> int:
        lines = [*self.heading.split("\n"), *self.values, self.foot]
        return max(map(len, lines)) + _BORDER


def print_comparison(console: Console, comparison: Comparison, metrics: Sequence[str]) -> None:
    """The table, its total, and what was left out; `metrics` are the columns to show instead of the first that fit."""
    asked, others = _chosen(comparison, metrics)
    least = _as_shown(asked[0]).width if asked else 0
    records = [run.record for run in comparison.runs]
    settings = differing_settings(records)
    varied = differing_overrides(records) or settings
    count = min(_SHOWN_DIFFERENCES, len(varied))
    while (room := _room(console, fixed := _fixed(comparison, dict(islice(varied.items(), count))))) < least and count:
        count -= 1
    fitting = [_as_shown(column) for column in asked]
    fitting = fitting if metrics else _that_fit(fitting, room)
    console.print(_table(_count(len(comparison.runs), "run"), [*fixed, *fitting]))
    hidden = len(varied.keys() | settings.keys()) - count
    _print_notes(console, comparison, [*asked[len(fitting) :], *others], hidden)
    for table in evaluation_tables(comparison.outputs, [run.name for run in comparison.runs]):
        _print_evaluations(console, table)


def _print_evaluations(console: Console, found: EvaluationTable) -> None:
    fixed = [_Shown("run", tuple(row.run for row in found.rows))]
    if any(row.point for row in found.rows):
        fixed.append(_Shown("swept", tuple(row.point for row in found.rows)))
    metrics = [
        _Shown(name.replace("/", "/\n"), tuple(format_interval(row.values, name) for row in found.rows), is_number=True)
        for name in found.metrics
    ]
    fitting = _that_fit(metrics, _room(console, fixed))
    console.print(_table(f"Evaluated: {found.conditions}", [*fixed, *fitting]))
    if left_out := len(metrics) - len(fitting):
        console.print(f"{_count(left_out, 'more metric')}: --json or --output", markup=False, soft_wrap=True)


def _that_fit(columns: Sequence[_Shown], room: int) -> list[_Shown]:
    """The first columns, up to one for which there is no room."""
    ends = accumulate(column.width for column in columns)
    return [column for column, _ in takewhile(lambda each: each[1] <= room, zip(columns, ends, strict=True))]


def _table(title: str, columns: Sequence[_Shown]) -> Table:
    has_feet = any(column.foot for column in columns)
    table = Table(title=Text(title), title_justify="left", show_footer=has_feet)
    for column in columns:
        justify = "right" if column.is_number else "left"
        table.add_column(Text(column.heading), Text(column.foot), overflow="fold", justify=justify)
    for cells in zip(*(column.values for column in columns), strict=True):
        table.add_row(*(Text(cell, style="bold green" if cell.endswith(_BEST) else "") for cell in cells))
    return table


def print_effects(console: Console, comparison: Comparison, metric: str) -> None:
    """What each parameter of a sweep does to a metric, and the members by their settings."""
    better = directions_of_effects(comparison).get(metric)
    direction = f" ({better.value} is better)" if better else ""
    console.print(
        f"{metric}{direction}: means over the members' distinct stages, ± standard deviation",
        markup=False,
        soft_wrap=True,
    )
    for effect in [*effects(comparison, metric), settings(comparison, metric)]:
        if effect is not None:
            console.print(_effect_table(effect, best_levels(effect, better)))


def _room(console: Console, fixed: Sequence[_Shown]) -> int:
    return console.width - 1 - sum(column.width for column in fixed)


def _effect_table(effect: Effect, best: Collection[Level]) -> Table:
    table = Table()
    table.add_column(effect.parameter, overflow="fold")
    for heading in ("runs", "mean", "±", "lowest", "highest"):
        table.add_column(heading, no_wrap=True, justify="right")
    for level in effect.levels:
        is_best = level in best
        mean = (format_number(level.mean) or "-") + (f" {_BEST}" if is_best else "")
        ends = [format_number(choose(level.values)) for choose in (min, max)] if level.points else ["", ""]
        style = "bold green" if is_best else ""
        table.add_row(Text(level.label), level.count, Text(mean, style=style), format_number(level.deviation), *ends)
    return table


def _fixed(comparison: Comparison, varied: Mapping[str, Sequence[str]]) -> list[_Shown]:
    """The columns that are always there: names, what differs, state, time, cost."""
    costs = [totals(run.stages, comparison) for run in comparison.runs]
    everything = totals(comparison.distinct_stages, comparison)
    return [
        _Shown("run", tuple(run.name for run in comparison.runs), "all"),
        *(
            _Shown(short_key(key).replace(".", "\n"), tuple(map(_cut, values)))
            for key, values in varied.items()
        ),
        _Shown("state", tuple(run.state.value for run in comparison.runs)),
        _Shown(
            "time", tuple(format_duration(cost.duration_s) for cost in costs),
            format_duration(everything.duration_s), is_number=True,
        ),
        _Shown(
            "device\nhours", tuple(format_hours(cost.device_hours) for cost in costs),
            format_hours(everything.device_hours), is_number=True,
        ),
    ]  # fmt: skip


def _chosen(comparison: Comparison, metrics: Sequence[str]) -> tuple[list[Column], list[Column]]:
    """The columns to show, the most telling first, and the rest: those of stages that all runs share, and details."""
    found = columns(comparison)
    if metrics:
        return named_columns(found, metrics), []
    telling = [
        column
        for column in found
        if column.quantity is Quantity.METRIC and column.is_headline and not comparison.is_common(column.stage)
    ]
    # The first metric of every stage before any stage's second; the last stages judge the others.
    order = {name: place for place, name in enumerate(reversed(comparison.stage_names))}
    seen: dict[str, int] = {}
    ranked = []
    for column in telling:
        seen[column.stage] = seen.get(column.stage, 0) + 1
        ranked.append((seen[column.stage], order[column.stage], column))
    first = [column for _, _, column in sorted(ranked, key=lambda each: each[:2])]
    return first, [column for column in found if column not in first]


def _as_shown(column: Column) -> _Shown:
    values = tuple(cell.text + (f" {_BEST}" if cell.is_best else "") for cell in column.cells)
    return _Shown(f"{column.stage}\n{column.title}", values, is_number=True)


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"


def _print_notes(console: Console, comparison: Comparison, left_out: Sequence[Column], hidden: int) -> None:
    """What the table leaves out: columns, and so many of the settings that differ."""
    notes = [f"{_BEST} the best of its column, where the stage says which way is better"]
    everything = totals(comparison.distinct_stages, comparison)
    if everything.shared_stages:
        notes.append(f"{_count(everything.shared_stages, 'stage')} shared by several runs: once in the total")
    if hidden:
        notes.append(f"{_count(hidden, 'more setting')} differ{'s' if hidden == 1 else ''}: --output, --csv or --json")
    if left_out:
        notes.append(f"{_count(len(left_out), 'more column')}: --csv, --json, --output, or --metric {left_out[0].key}")
    for run in comparison.runs:
        told = (stage for stage in run.stages if stage.state in (State.FAILED, State.DAMAGED))
        notes += [f"{run.name}: {stage.name} {stage.state}: {stage.detail}" for stage in told]
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
