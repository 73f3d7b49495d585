"""What `unclip evaluate` wrote of a run: `runs/<name>/evaluations/<when>.json`, and the plot of a sweep beside it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.runs import run_directory

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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            data = content["data"] if isinstance(content["data"], str) else " ".join(content["data"])
            plot = path.parent / content["plot"] if "plot" in content else None
            samples, points = int(content["settings"]["samples"]), content["points"]
            found.append(
                EvaluationRecord(
                    path, content["made_at"], data, samples, points, plot if plot and plot.is_file() else None
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
