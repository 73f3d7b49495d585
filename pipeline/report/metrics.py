"""Final metrics as they are compared: which way they improve, which numbers are bounds, and how a number is written."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import cast

from pipeline.errors import UserError
from pipeline.report.records import Comparison
from pipeline.workflow.declaration import Better, Catalog, StageDeclaration, resolve

_BOUNDS = ("_low", "_high")


def directions(comparison: Comparison) -> dict[str, Better]:
    """Which way `stage.metric` improves, for the metrics whose stage declares it."""
    catalogs = {run.catalog: _catalog(run.catalog) for run in comparison.runs}
    measured = dict.fromkeys(
        (catalogs[run.catalog].get(stage.kind), stage.name, metric)
        for run in comparison.runs
        for stage in run.stages
        for metric in stage.metrics
    )
    found = {
        f"{stage}.{metric}": _direction(metric, declaration.better)
        for declaration, stage, metric in measured
        if declaration is not None
    }
    return {key: better for key, better in found.items() if better is not None}


def is_bound(metric: str, metrics: Mapping[str, float]) -> bool:
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


def _catalog(reference: str) -> Mapping[str, StageDeclaration]:
    """The run's classes of stages; none where this installation does not have them, and then nothing is marked."""
    try:
        return cast(Catalog, resolve(reference)).stages
    except UserError:
        return {}


def _direction(metric: str, better: Mapping[str, Better]) -> Better | None:
    return next((direction for pattern, direction in better.items() if fnmatchcase(metric, pattern)), None)
