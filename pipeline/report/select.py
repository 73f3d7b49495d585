"""Which runs a name means: a run, a sweep, a shell pattern, or `sweep:NAME`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.runs import DamagedRunError, RunRecord, read_readable, read_runs, run_names

SWEEP = "sweep:"
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Selection:
    """The runs that are meant, each once, in the order of the names.

    `members` are the names of those that were asked for as members of a sweep, by `sweep:NAME`. `unreadable` says of
    runs in passing, a line each, why they were left out.
    """

    records: tuple[RunRecord, ...]
    members: tuple[str, ...]
    unreadable: tuple[str, ...]


def select_runs(outputs: Path, names: Sequence[str]) -> Selection:
    """Find the runs by their names. Raises `UserError` that lists what there is."""
    found: dict[str, RunRecord] = {}
    members: list[str] = []
    unreadable: dict[str, None] = {}
    for name in names:
        records, left_out = _selected(outputs, name)
        found |= {record.name: record for record in records if record.name not in found}
        unreadable |= dict.fromkeys(map(str, left_out))
        if name.startswith(SWEEP):
            members += [record.name for record in records]
    return Selection(tuple(found.values()), tuple(members), tuple(unreadable))


def _selected(outputs: Path, name: str) -> tuple[list[RunRecord], list[DamagedRunError]]:
    if name.startswith(SWEEP):
        return _sweep(outputs, name.removeprefix(SWEEP))
    if not _WILD.search(name):
        return read_runs(outputs, name), []
    there = run_names(outputs)
    matching = sorted((each for each in there if fnmatchcase(each, name)), key=_natural)
    if not matching:
        known = f"runs there: {', '.join(there)}" if there else "there is no run yet: start one with `unclip run`"
        raise UserError(f"no run matches {name!r} under {outputs}; {known}")
    records, unreadable = read_readable(outputs, matching)
    if not records:
        raise unreadable[0]
    return records, unreadable


def _sweep(outputs: Path, name: str) -> tuple[list[RunRecord], list[DamagedRunError]]:
    records, unreadable = read_readable(outputs, sorted(run_names(outputs), key=_natural))
    members = [record for record in records if record.group == name]
    if not members:
        sweeps = list(dict.fromkeys(record.group for record in records if record.group != record.name))
        known = f"sweeps there: {', '.join(sweeps)}" if sweeps else "start one with `unclip run -m`"
        raise UserError(f"no sweep {name!r} under {outputs}; {known}")
    return members, unreadable


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which `lambda.2` comes before `lambda.10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
