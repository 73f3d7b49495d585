"""Which runs a name means: a run, a sweep, a shell pattern, or `sweep:NAME`."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.runs import RunRecord, read_run, read_runs, run_names

SWEEP = "sweep:"
_WILD = re.compile(r"[*?\[]")


def select_runs(outputs: Path, names: Sequence[str]) -> list[RunRecord]:
    """The runs that are meant, each once, in the order of the names. Raises `UserError` that lists what there is."""
    found = {record.name: record for name in names for record in _selected(outputs, name)}
    return list(found.values())


def sweep_members(outputs: Path, names: Sequence[str]) -> list[str]:
    """The runs that were asked for as members of a sweep, by `sweep:NAME`."""
    return [record.name for name in names if name.startswith(SWEEP) for record in _selected(outputs, name)]


def _selected(outputs: Path, name: str) -> list[RunRecord]:
    if name.startswith(SWEEP):
        return _sweep(outputs, name.removeprefix(SWEEP))
    if not _WILD.search(name):
        return read_runs(outputs, name)
    there = run_names(outputs)
    matching = sorted((each for each in there if fnmatchcase(each, name)), key=_natural)
    if not matching:
        known = f"runs there: {', '.join(there)}" if there else "there is no run yet: start one with `unclip run`"
        raise UserError(f"no run matches {name!r} under {outputs}; {known}")
    return [read_run(outputs, each) for each in matching]


def _sweep(outputs: Path, name: str) -> list[RunRecord]:
    records = [read_run(outputs, each) for each in sorted(run_names(outputs), key=_natural)]
    members = [record for record in records if record.group == name]
    if not members:
        sweeps = list(dict.fromkeys(record.group for record in records if record.group != record.name))
        known = f"sweeps there: {', '.join(sweeps)}" if sweeps else "start one with `unclip run -m`"
        raise UserError(f"no sweep {name!r} under {outputs}; {known}")
    return members


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which `lambda.2` comes before `lambda.10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
