"""A stage's own record of its rows and pictures: one JSON object a line, in its work directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.workflow.record import AXIS, METRICS, PICTURES

_FILES = (METRICS, PICTURES)


def append(work: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Add an entry to one of the files."""
    with (work / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def cut_back(work: Path, samples_seen: int) -> None:
    """Forget what is past the checkpoint that training resumes from: it is logged again."""
    for path in _paths(work):
        kept = [entry for entry in _entries(path) if entry[AXIS] <= samples_seen]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), encoding="utf-8")
        temporary.replace(path)


def read_entries(work: Path) -> list[dict[str, Any]]:
    """Rows and pictures in the order of the axis."""
    return sorted((entry for path in _paths(work) for entry in _entries(path)), key=lambda entry: entry[AXIS])


def _paths(work: Path) -> list[Path]:
    return [work / name for name in _FILES if (work / name).exists()]


def _entries(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [entry for line in lines if (entry := _read(line))]


def _read(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the row that a kill cut short
