"""`unclip rm` and `unclip mv`: removing and renaming runs and sweeps."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunSettings, validate
from pipeline.errors import UserError, typed
from pipeline.store.references import References, read_references
from pipeline.store.removable import Found, obstacle, removables, split
from pipeline.store.trash import in_trash, set_aside
from pipeline.workflow.in_use import store_lock
from pipeline.workflow.runs import (
    RECORD,
    DamagedRunError,
    earlier_records,
    is_member,
    keys_of,
    read_readable,
    read_run,
    read_runs,
    run_directory,
    run_names,
)
from pipeline.workflow.sealed import write_json_atomically

RENAMED_FROM = "renamed_from"
"""The file in a run's folder that says its name before, until all runs that are renamed with it have theirs."""


@dataclass(frozen=True)
class Removal:
    """Runs, and what goes with them of what nobody else needs."""

    names: Sequence[str]
    found: Found


def removal_of(outputs: Path, given: Iterable[str], jobs: Mapping[Path, str]) -> Removal:
    """What removing these runs and sweeps takes: their folders, and what no other run needs.

    With one whose record is damaged goes its folder; what it needed is left to `unclip gc`, and all that is no folder
    of a run where others' records are damaged too. Raises `UserError` where one is not there, is pinned, or is at work.
    """
    names, damaged = _names_of(outputs, given)
    others = _others_damaged(outputs, names) if len(damaged) == len(names) else []
    references = read_references(outputs, jobs, without=[*damaged, *others])
    _require_idle(outputs, references, names)
    for name in names:
        if name in references.pinned:
            raise UserError(f"run {name} is pinned; unpin it first: {typed(outputs, 'gc', '--unpin', name)}")
    if others:  # what those need is not known
        return Removal(names, Found([], []))
    theirs = {key for name in names for key in references.of_runs.get(name, ())}
    theirs |= {key for name in names for record in earlier_records(outputs, name).values() for key in keys_of(record)}
    after = read_references(outputs, jobs, without=names)
    unneeded = removables(outputs, after, keeps_checkpoints=True, takes_caches=False)
    of_theirs = (each for each in unneeded if each.key in theirs)
    return Removal(names, split(of_theirs, lambda each: obstacle(outputs, each, after)))


def _names_of(outputs: Path, given: Iterable[str]) -> tuple[list[str], list[str]]:
    """The runs behind names of runs and sweeps; and those of them whose record is damaged."""
    names: dict[str, None] = {}
    damaged: list[str] = []
    for name in given:
        try:
            names |= dict.fromkeys(record.name for record in read_runs(outputs, name))
        except DamagedRunError as error:
            if error.run != name:
                raise
            names[name] = None
            damaged.append(name)
        except UserError as error:
            if not in_trash(outputs):
                raise
            end = typed(outputs, "gc", "--delete")
            raise UserError(f"{error}; what a removal that was stopped has left is deleted by {end}") from error
    return list(names), damaged


def _others_damaged(outputs: Path, names: Sequence[str]) -> list[str]:
    _, damaged = read_readable(outputs, run_names(outputs))
    return [each.run for each in damaged if each.run not in names]


def remove_runs(outputs: Path, given: Iterable[str], jobs: Mapping[Path, str]) -> Removal:
    """Take them out of the store, the records first: what a kill leaves of the rest, no run needs."""
    with store_lock(outputs) as owner:
        removal = removal_of(outputs, given, jobs)
        folders = [run_directory(outputs, name) for name in removal.names]
        for path in (*folders, *(each.path for each in removal.found.going)):
            owner.require()
            try:
                set_aside(outputs, path)
            except OSError as error:
                raise UserError(f"{path} cannot be removed ({error.strerror}); ask whose it is") from error
    return removal


def rename_run(outputs: Path, name: str, new: str, jobs: Mapping[Path, str]) -> dict[str, str]:
    """Rename a run, or the members of a sweep; new names by old ones.

    A rename of the folder is all that it takes, so that a kill leaves each run under the one name or the other, and
    the same command ends it. Raises `UserError` for a name that is taken or is none, and for a run that is at work.
    """
    validate(RunSettings, {"name": new}, "run")
    with store_lock(outputs):
        begun = _begun(outputs, name, new)
        try:
            members = [record.name for record in read_runs(outputs, name)]
        except DamagedRunError:
            raise
        except UserError:
            if not begun:
                raise
            members = []
        names = {each: f"{new}{each.removeprefix(name)}" for each in members}
        for each in names.values():
            validate(RunSettings, {"name": each}, "run")
        if names:  # with none left it was ended, but for what says so
            _require_free(outputs, new, names, begun)
        _require_idle(outputs, read_references(outputs, jobs), [*members, *begun.values()])
        for old in names:
            (run_directory(outputs, old) / RENAMED_FROM).write_text(old)
        for old, each in names.items():
            run_directory(outputs, old).rename(run_directory(outputs, each))
        done = begun | names
        for each in done.values():
            _write_name(outputs, each)
        for each in done.values():
            (run_directory(outputs, each) / RENAMED_FROM).unlink(missing_ok=True)
    return done


def _begun(outputs: Path, name: str, new: str) -> dict[str, str]:
    """The runs that a rename which was killed has left under their new names, by old ones."""
    found = {}
    for each in run_names(outputs):
        with suppress(OSError):
            old = (run_directory(outputs, each) / RENAMED_FROM).read_text(errors="replace")
            if old != each and f"{new}{old.removeprefix(name)}" == each and (old == name or is_member(old, name)):
                found[old] = each
    return found


def _write_name(outputs: Path, name: str) -> None:
    """Have a run's record say the name of its folder, and be as new as it was."""
    path = run_directory(outputs, name) / RECORD
    written = path.stat()
    write_json_atomically(path, read_run(outputs, name).model_dump(mode="json"))
    os.utime(path, (written.st_atime, written.st_mtime))


def _require_idle(outputs: Path, references: References, names: Iterable[str]) -> None:
    for name in names:
        if name in references.busy_runs:
            stop = typed(outputs, "cancel", name)
            raise UserError(f"run {name}: {references.busy_runs[name]}; wait for its end, or stop it: {stop}")


def _require_free(outputs: Path, new: str, names: Mapping[str, str], begun: Mapping[str, str]) -> None:
    own = [*names, *begun.values()]
    taken = [each for each in names.values() if os.path.lexists(run_directory(outputs, each))]
    taken += [
        each
        for each in (*run_names(outputs), *([new] if os.path.lexists(run_directory(outputs, new)) else []))
        if each not in own and (each == new or is_member(each, new))
    ]
    if taken:
        raise UserError(f"there is a run {taken[0]} already; choose another name than {new}")
