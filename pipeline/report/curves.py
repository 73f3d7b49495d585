"""Loss and metric curves of compared stages, thinned to what a page can draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.records import ELAPSED, Comparison, StageReport, read_rows
from pipeline.workflow.metrics import AXIS

POINTS_OF_A_PAGE = 240_000
MOST_POINTS = 600
FEWEST_POINTS = 60
_OLD_NAMES = {"samples_per_s": "system/samples_per_s"}
_DIGITS = 5


@dataclass(frozen=True)
class Curve:
    """One metric of one stage: samples seen, hours of training (None where the record lacks them) and values."""

    stage: str
    metric: str
    fingerprint: str
    samples: tuple[int, ...]
    hours: tuple[float, ...] | None
    values: tuple[float, ...]


def curves(comparison: Comparison) -> list[Curve]:
    """Every metric of every distinct stage that logged at least two finite values of it."""
    whole = [curve for stage in comparison.distinct_stages for curve in _stage_curves(stage)]
    limit = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_A_PAGE // max(1, len(whole))))
    return [_thinned(curve, limit) for curve in whole]


def _stage_curves(stage: StageReport) -> list[Curve]:
    points: dict[str, list[tuple[int, float | None, float]]] = {}
    elapsed_s: float | None = None
    for row in read_rows(stage.rows_path):
        elapsed_s = row.get(ELAPSED, elapsed_s)
        hours = None if elapsed_s is None else elapsed_s / 3600
        for name, value in _logged(row).items():
            points.setdefault(name, []).append((row[AXIS], hours, value))
    return [_curve(stage, metric, found) for metric, found in points.items() if len(found) > 1]


def _logged(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        _OLD_NAMES.get(name, name): float(value)
        for name, value in row.items()
        if name not in (AXIS, ELAPSED) and isinstance(value, int | float) and math.isfinite(value)
    }


def _curve(stage: StageReport, metric: str, points: Sequence[tuple[int, float | None, float]]) -> Curve:
    hours = [hour for _, hour, _ in points if hour is not None]
    return Curve(
        stage=stage.name,
        metric=metric,
        fingerprint=stage.fingerprint,
        samples=tuple(samples for samples, _, _ in points),
        hours=tuple(_rounded(hour) for hour in hours) if len(hours) == len(points) else None,
        values=tuple(_rounded(value) for _, _, value in points),
    )


def _thinned(curve: Curve, limit: int) -> Curve:
    """At most `limit` of its points: the lowest and the highest of each stretch, so that no spike is lost."""
    count = len(curve.values)
    if count <= limit:
        return curve
    stretches = limit // 2
    kept: list[int] = []
    for number in range(stretches):
        places = range(number * count // stretches, (number + 1) * count // stretches)
        kept += sorted({min(places, key=curve.values.__getitem__), max(places, key=curve.values.__getitem__)})
    return Curve(
        curve.stage,
        curve.metric,
        curve.fingerprint,
        tuple(curve.samples[place] for place in kept),
        tuple(curve.hours[place] for place in kept) if curve.hours else None,
        tuple(curve.values[place] for place in kept),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
