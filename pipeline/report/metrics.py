"""Final metrics as they are compared: which way they improve, which numbers are bounds, and how a number is written."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

from pipeline.errors import UserError
from pipeline.report.records import Comparison
from pipeline.workflow.declaration import Better, Catalog, StageDeclaration, resolve

_BOUNDS = ("_low", "_high")


def directions(comparison: Comparison) -> dict[str, Better]:
    """Which way `stage.metric` improves, for the metrics whose stage declares it."""
    catalogs = {run.catalog: _catalog(run.catalog) for run in comparison.runs}
    measured = dict.fromkeys(
        (run.catalog, stage.kind, stage.name, metric)
        for run in comparison.runs
        for stage in run.stages
        for metric in stage.metrics
    )
    found: dict[str, Better] = {}
    for catalog, kind, stage, metric in measured:
        declaration = catalogs[catalog].get(kind)
        patterns = () if declaration is None else declaration.better.items()
        better = next((direction for pattern, direction in patterns if fnmatchcase(metric, pattern)), None)
        if better is not None:
            found[f"{stage}.{metric}"] = better
    return found


def is_bound(metric: str, metrics: Mapping[str, Any]) -> bool:
    """Whether it is an end of another metric's interval: `x_low` or `x_high` where there are `x` and both ends."""
    return any(
        metric.endswith(bound) and all(metric.removesuffix(bound) + end in metrics for end in ("", *_BOUNDS))
        for bound in _BOUNDS
    )


def finite(value: float | None) -> float | None:
    """The number, or None for what cannot be compared, drawn or written as JSON: nan and the infinities."""
    return value if value is not None and math.isfinite(value) else None


def format_number(value: float | None) -> str:
    """Four digits that count; whole numbers in full; `nan` and `inf` by these names; nothing for None."""
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def format_interval(metrics: Mapping[str, float | None], name: str) -> str:
    """A metric with its interval where it has one, as in `0.5 (0.4 to 0.6)`; nothing where it is missing."""
    ends = [metrics.get(f"{name}{bound}") for bound in _BOUNDS]
    interval = f" ({format_number(ends[0])} to {format_number(ends[1])})" if None not in ends else ""
    return f"{format_number(metrics.get(name))}{interval}"


def _catalog(reference: str) -> Mapping[str, StageDeclaration]:
    """The run's classes of stages; none where this installation does not have them, and then nothing is marked."""
    try:
        return cast(Catalog, resolve(reference)).stages
    except UserError:
        return {}
