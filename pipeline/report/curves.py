"""Loss and metric curves of compared stages, thinned to what a page can draw."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.report.records import Comparison, StageReport
from pipeline.report.rows import ELAPSED, elapsed, sampled_rows
from pipeline.workflow.record import AXIS

ROWS_OF_A_PAGE = 200_000
FEWEST_ROWS = 150
POINTS_OF_A_PAGE = 240_000
MOST_POINTS = 600
FEWEST_POINTS = 60
_OLD_NAMES = {"samples_per_s": "system/samples_per_s"}
_AXES = frozenset({AXIS, ELAPSED})
_NUMBERS = frozenset({int, float})
_DIGITS = 5


@dataclass(frozen=True)
class Curve:
    """One metric of one stage: samples seen, hours of training (None where the record lacks them) and values.

    `is_whole`: the stage's rows were all read, so that no spike is missing.
    """

    stage: str
    metric: str
    fingerprint: str
    samples: tuple[int, ...]
    hours: tuple[float, ...] | None
    values: tuple[float, ...]
    is_whole: bool


@dataclass
class _Points:
    samples: list[int] = field(default_factory=list)
    hours: list[float | None] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def curves(comparison: Comparison) -> list[Curve]:
    """Every metric of every distinct stage that logged at least two finite values of it."""
    stages = comparison.distinct_stages
    rows = max(FEWEST_ROWS, ROWS_OF_A_PAGE // max(1, len(stages)))
    found = [(stage, *_stage_points(stage, rows)) for stage in stages]
    count = sum(len(points) for _, points, _ in found)
    limit = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_A_PAGE // max(1, count)))
    return [
        _curve(stage, metric, points, limit, is_whole=is_whole)
        for stage, metrics, is_whole in found
        for metric, points in metrics.items()
    ]


def _stage_points(stage: StageReport, limit: int) -> tuple[dict[str, _Points], bool]:
    """The points of each metric, from so many rows, and whether these are all."""
    found: defaultdict[str, _Points] = defaultdict(_Points)
    elapsed_s: float | None = None
    rows = sampled_rows(stage.rows_path, limit)
    for row in rows.rows:
        elapsed_s = elapsed(row, elapsed_s)
        hours = None if elapsed_s is None else elapsed_s / 3600
        samples = row[AXIS]
        for name, value in row.items():
            # As `is_finite_number`, without a call for each value: inf and nan minus themselves are nan.
            if name in _AXES or type(value) not in _NUMBERS or value - value != 0:
                continue
            points = found[name]
            points.samples.append(samples)
            points.hours.append(hours)
            points.values.append(value)
    named = {_OLD_NAMES.get(name, name): points for name, points in found.items() if len(points.values) > 1}
    return named, rows.is_whole


def _curve(stage: StageReport, metric: str, points: _Points, limit: int, *, is_whole: bool) -> Curve:
    places = thinned(points.values, limit)
    hours = [hour for place in places if (hour := points.hours[place]) is not None]
    return Curve(
        stage=stage.name,
        metric=metric,
        fingerprint=stage.fingerprint,
        samples=tuple(points.samples[place] for place in places),
        hours=tuple(map(_rounded, hours)) if None not in points.hours else None,
        values=tuple(_rounded(points.values[place]) for place in places),
        is_whole=is_whole,
    )


def thinned(values: Sequence[float], limit: int) -> Sequence[int]:
    """The places of at most `limit` values (4 or more): both ends, and the lowest and the highest of each stretch.

    So no spike is lost, and a curve goes on to where its record ends.
    """
    count = len(values)
    if count <= limit:
        return range(count)
    stretches = (limit - 2) // 2
    kept = {0, count - 1}
    for number in range(stretches):
        places = range(number * count // stretches, (number + 1) * count // stretches)
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
