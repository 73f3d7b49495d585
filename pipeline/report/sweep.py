"""A sweep as one thing: its members by their overrides, and what each parameter does to a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from pipeline.errors import UserError
from pipeline.report.differences import differing_overrides
from pipeline.report.metrics import directions, finite, is_bound
from pipeline.report.records import Comparison, StageReport
from pipeline.report.table import Quantity
from pipeline.workflow.declaration import Better


@dataclass(frozen=True)
class SweepView:
    """A sweep's members, and the metric that its effects are shown on first."""

    members: Comparison
    metric: str


@dataclass(frozen=True)
class Point:
    """One measurement: the value of one stage, and the numbers of the runs that share it."""

    runs: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Level:
    """The members with one value of a parameter (or one setting of all).

    `runs` is how many there are and `stages` how many distinct stages stand behind them, each of which is one point
    where it has the metric: three members on one painter have measured it once.
    """

    label: str
    points: tuple[Point, ...]
    runs: int
    stages: int

    @property
    def values(self) -> list[float]:
        """The metric of each distinct stage that has it."""
        return [point.value for point in self.points]

    @property
    def mean(self) -> float | None:
        """The mean over the distinct stages that have the metric."""
        return mean(self.values) if self.points else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over them; None of fewer than two."""
        return stdev(self.values) if len(self.points) > 1 else None

    @property
    def count(self) -> str:
        """How many runs and measurements it is made of: `3`, `2 of 3`, or `3 on 1 stage`."""
        found = len(self.points)
        if self.stages < self.runs:
            share = "" if found == self.stages else f"{found} of "
            return f"{self.runs} on {share}{self.stages} stage{'' if self.stages == 1 else 's'}"
        return str(self.runs) if found == self.runs else f"{found} of {self.runs}"


@dataclass(frozen=True)
class Effect:
    """A parameter's levels, in the order of their numbers where all are numbers, else of the members."""

    parameter: str
    levels: tuple[Level, ...]
    is_numeric: bool


def parameters(comparison: Comparison) -> dict[str, list[str]]:
    """The overrides that differ between the members, with each member's value."""
    return differing_overrides([run.record for run in comparison.runs])


def effects(comparison: Comparison, metric: str, varied: Mapping[str, list[str]] | None = None) -> list[Effect]:
    """Each parameter's levels with the metric of their members: averages over all that else was varied.

    `varied` are the sweep's `parameters`, for who asks for many metrics.
    """
    measured = _measured(comparison, metric)
    found = []
    for parameter, labels in (varied or parameters(comparison)).items():
        is_numeric = all(_number(label) is not None for label in labels)
        order = sorted(dict.fromkeys(labels), key=lambda label: _number(label) or 0.0) if is_numeric else labels
        found.append(Effect(parameter, _levels(order, labels, measured), is_numeric))
    return found


def settings(comparison: Comparison, metric: str, varied: Mapping[str, list[str]] | None = None) -> Effect | None:
    """The members by all their parameters but seeds, repetitions together; None where fewer than two are varied."""
    varied = {
        key: labels for key, labels in (varied or parameters(comparison)).items() if key.rpartition(".")[2] != "seed"
    }
    if len(varied) < 2:
        return None
    labels = [
        ", ".join(f"{short_key(key)}={values[number]}" for key, values in varied.items())
        for number in range(len(comparison.runs))
    ]
    return Effect("setting", _levels(labels, labels, _measured(comparison, metric)), False)


def short_key(key: str) -> str:
    """The last two parts of a dotted key: what a reader needs of it beside its fellows."""
    return ".".join(key.rsplit(".", 2)[-2:])


def best_levels(effect: Effect, better: Better | None) -> tuple[Level, ...]:
    """The levels with the best mean; none where the direction is unknown or all are alike."""
    means = {level.mean for level in effect.levels if level.mean is not None}
    if better is None or len(means) < 2:
        return ()
    best = min(means) if better is Better.LOW else max(means)
    return tuple(level for level in effect.levels if level.mean == best)


def directions_of_effects(comparison: Comparison) -> dict[str, Better]:
    """Which way what effects are shown on improves: the declared metrics, and time and cost."""
    costs = [f"{stage}.{each}" for stage in comparison.stage_names for each in (Quantity.TIME, Quantity.COST)]
    return dict.fromkeys(costs, Better.LOW) | directions(comparison)


def metric_values(comparison: Comparison, metric: str) -> list[float | None]:
    """`stage.metric`, or `stage.time_s` and the like, of every run: finite numbers of finished stages alone."""
    return [value for _, value in _measured(comparison, metric)]


def metric_names(comparison: Comparison) -> list[str]:
    """Every `stage.metric` that some run has, be it nan; those of the last stages first."""
    found: dict[str, None] = {}
    for name in reversed(comparison.stage_names):
        for stage in (run.stage(name) for run in comparison.runs):
            if stage is not None and stage.is_finished:
                found |= dict.fromkeys(f"{name}.{each}" for each in stage.metrics if not is_bound(each, stage.metrics))
    return list(found)


def chosen_metric(comparison: Comparison, asked: str | None) -> str | None:
    """The metric that was asked for, else `run.objective`, else the first of the last stages that is known to improve.

    Time, cost and samples of a stage can be asked for too. Raises `UserError` for what no run has; None where no run
    has any.
    """
    names = metric_names(comparison)
    if asked is not None:
        costs = [f"{stage}.{quantity}" for stage in comparison.stage_names for quantity in _MEASURES]
        if asked not in names and asked not in costs:
            shown = f"there are {', '.join([*names, *costs])}" if names else "no stage of these runs has finished"
            raise UserError(f"--metric {asked!r} is no final metric of these runs; {shown}")
        return asked
    objectives = {run.record.config["run"].get("objective") for run in comparison.runs}
    objective = next((each for each in names if each in objectives), None)
    known = directions(comparison)
    varied = [name for name in names if len(set(metric_values(comparison, name))) > 1]
    return objective or next((name for name in [*varied, *names] if name in known), names[0] if names else None)


_Measured = Sequence[tuple[str, float | None]]
"""For each run: what identifies the stage that was measured, and its metric."""


def _measured(comparison: Comparison, metric: str) -> _Measured:
    stage_name, _, name = metric.partition(".")
    stages = [run.stage(stage_name) for run in comparison.runs]
    return [
        # A run without the stage stands for itself.
        (stage.fingerprint if stage else run.name, finite(_value(stage, name)) if stage and stage.is_finished else None)
        for run, stage in zip(comparison.runs, stages, strict=True)
    ]


def _value(stage: StageReport, name: str) -> float | None:
    if name in stage.metrics:
        return stage.metrics[name]
    return _MEASURES[name](stage) if name in _MEASURES else None


_MEASURES: Mapping[str, Callable[[StageReport], float | None]] = {
    Quantity.TIME.value: lambda stage: stage.duration_s,
    Quantity.COST.value: lambda stage: stage.device_hours,
    Quantity.SAMPLES.value: lambda stage: float(stage.samples_seen),
}


def _levels(order: Sequence[str], labels: Sequence[str], measured: _Measured) -> tuple[Level, ...]:
    found = []
    for label in dict.fromkeys(order):
        numbers = [number for number, each in enumerate(labels) if each == label]
        sharing: dict[str, list[int]] = {}
        for number in numbers:
            sharing.setdefault(measured[number][0], []).append(number)
        points = [Point(tuple(runs), value) for runs in sharing.values() if (value := measured[runs[0]][1]) is not None]
        found.append(Level(label, tuple(points), len(numbers), len(sharing)))
    return tuple(found)


def _number(label: str) -> float | None:
    try:
        return finite(float(label))
    except ValueError:
        return None
