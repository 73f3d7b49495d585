"""What `unclip evaluate` wrote of a run: `runs/<name>/evaluations/<when>.json`, and the plot of a sweep beside it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.errors import UserError
from pipeline.workflow.runs import run_directory
from pipeline.workflow.sealed import read_or_none

EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation. `points` are metrics by what was swept, such as "guidance=2"; one alone, "", without a sweep."""

    path: Path
    made_at: str
    data: str
    samples: int
    points: Mapping[str, Mapping[str, float | None]]
    plot: Path | None


@dataclass(frozen=True)
class _Settings:
    samples: int


@dataclass(frozen=True)
class _Written:
    """What is read of the file."""

    made_at: str
    data: str | list[str]
    settings: _Settings
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
    """A run's evaluations, the latest first; what cannot be read as one is left out."""
    found = []
    for path in sorted((run_directory(outputs, run) / EVALUATIONS).glob("*.json"), reverse=True):
        content = read_or_none(_WRITTEN, path, "it is left out")
        if content is not None:
            data = content.data if isinstance(content.data, str) else " ".join(content.data)
            plot = None if content.plot is None else path.parent / Path(content.plot).name
            has_plot = plot is not None and plot.is_file()
            found.append(
                EvaluationRecord(
                    path, content.made_at, data, content.settings.samples, content.points, plot if has_plot else None
                )
            )
    return found
