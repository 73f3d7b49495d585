"""`report.html`: one self-contained page that asks the network for nothing."""

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import UserError
from pipeline.report.curves import curves
from pipeline.report.differences import ABSENT, differing_settings
from pipeline.report.evaluations import evaluation_tables
from pipeline.report.graph import sharing_graph
from pipeline.report.metrics import finite, format_interval, format_number
from pipeline.report.pictures import picture_tables
from pipeline.report.records import Comparison
from pipeline.report.sweep import (
    Effect,
    SweepView,
    best_levels,
    directions_of_effects,
    effects,
    metric_names,
    metric_values,
    parameters,
    settings,
)
from pipeline.report.table import columns, format_hours, totals
from pipeline.terminal.words import format_duration
from pipeline.workflow.declaration import Better

_ASSETS = "assets"


def write_page(comparison: Comparison, path: Path, sweep: SweepView | None = None) -> None:
    """Write the page; with a sweep, it has the effects of its parameters. Raises `UserError` where it cannot."""
    content = page(comparison, sweep)
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror}); give a file in a directory of yours"
        ) from error


@dataclass(frozen=True)
class Live:
    """What a served page has on top: `html` of what runs now, its `version`, and the `script` that asks again."""

    html: Markup
    version: str
    script: str


def page(comparison: Comparison, sweep: SweepView | None = None, live: Live | None = None) -> str:
    """The page's HTML. All that comes from configs, captions and records is escaped."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", _ASSETS), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    environment.filters |= {"duration": format_duration, "hours": format_hours}
    environment.filters |= {"number": format_number, "finite": finite, "interval": format_interval, "uri": _uri}
    records = [run.record for run in comparison.runs]
    found = columns(comparison)
    most = max(map(comparison.count_distinct, comparison.stage_names), default=0)
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        runs=comparison.runs,
        made_at=time.strftime("%Y-%m-%d %H:%M"),
        differences=differing_settings(records),
        absent=ABSENT,
        columns=found,
        costs=[totals(run.stages, comparison) for run in comparison.runs],
        totals=totals(comparison.distinct_stages, comparison),
        stages=[(name, comparison.count_distinct(name) == most) for name in comparison.stage_names],
        evaluations=evaluation_tables(comparison.outputs, [run.name for run in comparison.runs]),
        pictures=picture_tables(comparison),
        graph=sharing_graph(comparison),
        is_sweep=sweep is not None,
        live=live,
        data=_data(comparison, sweep),
        asset=_asset,
        nonce=token_urlsafe(16),
    )


def _uri(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode('ascii')}"


def _asset(name: str) -> Markup:
    """A file of this package as it is: ours and the chart library's, never a user's."""
    return Markup((files("pipeline.report") / _ASSETS / name).read_text(encoding="utf-8"))


def _data(comparison: Comparison, sweep: SweepView | None) -> dict[str, Any]:
    """What the page's script draws from."""
    numbers = {run.name: number for number, run in enumerate(comparison.runs)}
    by_stage: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for curve in curves(comparison):
        of_metric = by_stage.setdefault(curve.stage, {}).setdefault(curve.metric, [])
        runs = [numbers[name] for name in comparison.users[curve.fingerprint]]
        drawn = {"samples": curve.samples, "hours": curve.hours, "values": curve.values, "isWhole": curve.is_whole}
        of_metric.append({"runs": runs, **drawn})
    return {
        "runs": [run.name for run in comparison.runs],
        "curves": by_stage,
        "common": [name for name in comparison.stage_names if comparison.is_common(name)],
        "sweep": None if sweep is None else _sweep_data(sweep, numbers),
    }


def _sweep_data(sweep: SweepView, numbers: Mapping[str, int]) -> dict[str, Any]:
    comparison, metric = sweep.members, sweep.metric
    places = [numbers[run.name] for run in comparison.runs]
    better = directions_of_effects(comparison)
    varying = [name for name in metric_names(comparison) if len(set(metric_values(comparison, name))) > 1]
    metrics, varied = {}, parameters(comparison)
    for name in dict.fromkeys([metric, *varying]):
        found = [*effects(comparison, name, varied), settings(comparison, name, varied)]
        shown = [_effect_data(effect, places, better.get(name)) for effect in found if effect is not None]
        metrics[name] = {"better": better.get(name), "effects": shown}
    return {"metric": metric, "metrics": metrics}


def _effect_data(effect: Effect, places: Sequence[int], better: Better | None) -> dict[str, Any]:
    """An effect with the numbers that its members have among all runs of the page."""
    best = best_levels(effect, better)
    levels = [
        {
            "label": level.label,
            "count": level.count,
            "mean": level.mean,
            "deviation": level.deviation,
            "isBest": level in best,
            "points": [([places[member] for member in point.runs], point.value) for point in level.points],
        }
        for level in effect.levels
    ]
    return {"parameter": effect.parameter, "isNumeric": effect.is_numeric, "levels": levels}
