"""What `unclip evaluate` wrote of a run: `runs/<name>/evaluations/<when>.json`, and the plot of a sweep beside it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.errors import UserError
from pipeline.report.metrics import is_bound
from pipeline.workflow.runs import run_directory
from pipeline.workflow.sealed import read_or_none, warn

EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation. `points` are metrics by what was swept, such as "guidance=2"; one alone, "", without a sweep."""

    path: Path
    made_at: str
    data: str
    samples: int
    encoders: Mapping[str, str]
    points: Mapping[str, Mapping[str, float | None]]
    plot: Path | None

    @property
    def conditions(self) -> str:
        """What two evaluations have in common if their figures compare: data, samples, files of encoders."""
        encoders = [f"{name} {digest[:8]}" for name, digest in sorted(self.encoders.items())]
        return ", ".join([self.data, f"{self.samples:,} samples", *encoders])


@dataclass(frozen=True)
class _Settings:
    samples: int


@dataclass(frozen=True)
class _Written:
    """What is read of the file."""

    made_at: str
    data: str | list[str]
    settings: _Settings
    encoders: dict[str, str]
    points: dict[str, dict[str, float | None]]
    plot: str | None = None


_WRITTEN = TypeAdapter(_Written)


def evaluations_directory(outputs: Path, run: str) -> Path:
    """Where a run's evaluations are written. Raises `UserError` where that cannot be."""
    directory = run_directory(outputs, run) / EVALUATIONS
    try:
        directory.mkdir(exist_ok=True)
        probe = directory / f".{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}); make it a directory that you may write to"
        ) from error
    return directory


def new_evaluation(directory: Path, swept: str) -> Path:
    """A new record's path, of which no other is: they sort by when they were made."""
    ending = f"-{swept}.json" if swept else ".json"
    while (path := directory / f"{time.strftime('%Y%m%d-%H%M%S')}{ending}").exists():
        time.sleep(0.1)
    return path


def read_evaluations(outputs: Path, run: str) -> list[EvaluationRecord]:
    """A run's evaluations, the latest first; what cannot be read as one is left out, and said."""
    found = []
    for path in sorted((run_directory(outputs, run) / EVALUATIONS).glob("*.json"), reverse=True):
        content = read_or_none(_WRITTEN, path, "it is left out")
        if content is not None:
            data = content.data if isinstance(content.data, str) else " ".join(content.data)
            plot = None if content.plot is None else path.parent / Path(content.plot).name
            if plot is not None and not plot.is_file():
                warn(f"{plot} is missing; its evaluation is shown without it")
                plot = None
            record = EvaluationRecord(
                path, content.made_at, data, content.settings.samples, content.encoders, content.points, plot
            )
            found.append(record)
    return found


@dataclass(frozen=True)
class EvaluationRow:
    """The latest values of a run, at a `point` of what was swept if anything was."""

    run: str
    point: str
    made_at: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class EvaluationTable:
    """What was measured under the same `conditions`, and so compares; and by name the plots of what was swept."""

    conditions: str
    rows: tuple[EvaluationRow, ...]
    plots: Mapping[str, Path]

    @property
    def metrics(self) -> list[str]:
        """All metrics of all rows; the ends of intervals are none."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values if not is_bound(name, row.values)))


def evaluation_tables(outputs: Path, runs: Sequence[str]) -> list[EvaluationTable]:
    """The runs' evaluations by what they were made of, those of most runs first.

    A metric that was measured twice has its latest value.
    """
    found: dict[str, dict[tuple[str, str], EvaluationRow]] = {}
    plots: dict[str, dict[str, Path]] = {}
    for run in runs:
        for record in reversed(read_evaluations(outputs, run)):
            rows = found.setdefault(record.conditions, {})
            if record.plot is not None:
                plots.setdefault(record.conditions, {})[f"{run}, {record.made_at}"] = record.plot
            for point, values in record.points.items():
                before = rows[run, point].values if (run, point) in rows else {}
                rows[run, point] = EvaluationRow(run, point, record.made_at, {**before, **values})
    tables = [EvaluationTable(each, tuple(rows.values()), plots.get(each, {})) for each, rows in found.items()]
    return sorted(tables, key=lambda table: -len({row.run for row in table.rows}))
