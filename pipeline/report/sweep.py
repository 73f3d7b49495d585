"""A sweep as one thing: its members by their overrides, and what each parameter does to a metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from pipeline.errors import UserError
from pipeline.report.differences import differing_overrides
from pipeline.report.metrics import directions, is_bound
from pipeline.report.records import Comparison
from pipeline.workflow.declaration import Better


@dataclass(frozen=True)
class SweepView:
    """A sweep's members, and the metric that its effects are shown on first."""

    members: Comparison
    metric: str


@dataclass(frozen=True)
class Level:
    """The members with one value of a parameter (or one setting of all): `points` are (run's number, metric)."""

    label: str
    points: tuple[tuple[int, float], ...]
    members: int

    @property
    def mean(self) -> float | None:
        """The metric's mean over the members that have it."""
        return mean(value for _, value in self.points) if self.points else None

    @property
    def deviation(self) -> float | None:
        """The metric's standard deviation; None of fewer than two."""
        return stdev(value for _, value in self.points) if len(self.points) > 1 else None


@dataclass(frozen=True)
class Effect:
    """A parameter's levels, in the order of their numbers where all are numbers, else of the members."""

    parameter: str
    levels: tuple[Level, ...]
    is_numeric: bool


def parameters(comparison: Comparison) -> dict[str, list[str]]:
    """The overrides that differ between the members, with each member's value."""
    return differing_overrides([run.record for run in comparison.runs])


def effects(comparison: Comparison, metric: str) -> list[Effect]:
    """Each parameter's levels with the metric of their members: averages over all that else was varied."""
    values = metric_values(comparison, metric)
    found = []
    for parameter, labels in parameters(comparison).items():
        is_numeric = all(_number(label) is not None for label in labels)
        order = sorted(dict.fromkeys(labels), key=lambda label: _number(label) or 0.0) if is_numeric else labels
        found.append(Effect(parameter, _levels(order, labels, values), is_numeric))
    return found


def settings(comparison: Comparison, metric: str) -> Effect | None:
    """The members by all their parameters but seeds, repetitions together; None where fewer than two are varied."""
    varied = {key: labels for key, labels in parameters(comparison).items() if not _is_seed(key)}
    if len(varied) < 2:
        return None
    labels = [
        ", ".join(f"{short_key(key)}={values[number]}" for key, values in varied.items())
        for number in range(len(comparison.runs))
    ]
    return Effect("setting", _levels(labels, labels, metric_values(comparison, metric)), False)


def short_key(key: str) -> str:
    """The last two parts of a dotted key: what a reader needs of it beside its fellows."""
    return ".".join(key.rsplit(".", 2)[-2:])


def best_level(effect: Effect, better: Better | None) -> Level | None:
    """The level with the best mean; None where the direction is unknown or all are alike."""
    ready = [level for level in effect.levels if level.mean is not None]
    if better is None or len({level.mean for level in ready}) < 2:
        return None
    choose = min if better is Better.LOW else max
    return choose(ready, key=lambda level: level.mean or 0.0)


def metric_values(comparison: Comparison, metric: str) -> list[float | None]:
    """`stage.metric` of every run, of finished stages alone."""
    stage_name, _, name = metric.partition(".")
    stages = [run.stage(stage_name) for run in comparison.runs]
    return [stage.metrics.get(name) if stage and stage.is_finished else None for stage in stages]


def metric_names(comparison: Comparison) -> list[str]:
    """Every `stage.metric` that some run has; those of the last stages first."""
    found: dict[str, None] = {}
    for name in reversed(comparison.stage_names):
        for stage in (run.stage(name) for run in comparison.runs):
            if stage is not None and stage.is_finished:
                found |= dict.fromkeys(f"{name}.{each}" for each in stage.metrics if not is_bound(each, stage.metrics))
    return list(found)


def chosen_metric(comparison: Comparison, asked: str | None) -> str | None:
    """The metric that was asked for, else `run.objective`, else the first of the last stages that is known to improve.

    Raises `UserError` for one that no run has; None where no run has any.
    """
    names = metric_names(comparison)
    if asked is not None:
        if asked not in names:
            shown = f"there are {', '.join(names)}" if names else "no stage of these runs has finished"
            raise UserError(f"--metric {asked!r} is no final metric of these runs; {shown}")
        return asked
    objectives = {run.record.config["run"].get("objective") for run in comparison.runs}
    objective = next((each for each in names if each in objectives), None)
    known = directions(comparison)
    varied = [name for name in names if len(set(metric_values(comparison, name))) > 1]
    return objective or next((name for name in [*varied, *names] if name in known), names[0] if names else None)


def _levels(order: Sequence[str], labels: Sequence[str], values: Sequence[float | None]) -> tuple[Level, ...]:
    found = []
    for label in dict.fromkeys(order):
        numbers = [number for number, each in enumerate(labels) if each == label]
        points = [(number, value) for number in numbers if (value := values[number]) is not None]
        found.append(Level(label, tuple(points), len(numbers)))
    return tuple(found)


def _is_seed(key: str) -> bool:
    return key.lstrip("+").rpartition(".")[2] == "seed"


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None
