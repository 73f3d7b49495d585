"""`unclip gc`: removes what no run needs.

What is younger than some hours stays unless it is asked for, since the records may not tell all: a config that was
changed a moment ago may be changed back, and processes of an earlier version do not say what they have planned with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, is_disk_full
from pipeline.store.references import PIN, read_references
from pipeline.store.removable import Removable, obstacle, removables
from pipeline.store.trash import delete_in_place, empty_trash, in_trash, set_aside
from pipeline.workflow.in_use import forget_ended_commands, store_lock
from pipeline.workflow.runs import read_runs, run_directory

DEFAULT_AGE = "6h"


@dataclass(frozen=True)
class Found:
    """What goes, and what stays although no run needs it, with the reason."""

    going: Sequence[Removable]
    staying: Sequence[tuple[Removable, str]]


def find(
    outputs: Path, jobs: Mapping[Path, str], *, older_than_s: float, keeps_checkpoints: bool, takes_caches: bool
) -> Found:
    """Look, and write nothing."""
    references = read_references(outputs, jobs)
    going: list[Removable] = []
    staying: list[tuple[Removable, str]] = []
    for each in removables(outputs, references, keeps_checkpoints=keeps_checkpoints, takes_caches=takes_caches):
        why = obstacle(outputs, each, references)
        if why is None and each.age_s < older_than_s:
            why = "too young"
        if why is None:
            going.append(each)
        else:
            staying.append((each, why))
    return Found(going, staying)


def take_away(outputs: Path, going: Iterable[Removable], jobs: Mapping[Path, str]) -> Found:
    """Take it out of the store, but for what has come into use since it was found. The trash is left to the caller.

    Raises `OSError` on a disk that is full to the last byte: see `make_room`.
    """
    gone: list[Removable] = []
    staying: list[tuple[Removable, str]] = []
    with store_lock(outputs) as owner:
        references = read_references(outputs, jobs)
        for each in going:
            why = obstacle(outputs, each, references)
            if why is None:
                owner.require()
                try:
                    set_aside(outputs, each.path)
                except FileNotFoundError:
                    pass  # it has gone already
                except OSError as error:
                    if is_disk_full(error):
                        raise
                    why = f"it cannot be removed ({error.strerror})"
            if why is None:
                gone.append(each)
            else:
                staying.append((each, why))
        forget_ended_commands(outputs)
    return Found(gone, staying)


def make_room(outputs: Path, going: Sequence[Removable], jobs: Mapping[Path, str]) -> None:
    """Free the few bytes that `take_away` writes: delete the trash, or else the largest of what goes.

    That needs no lock: nobody can record a run on a full disk, and who does once there is room finds no manifest.
    """
    if in_trash(outputs):
        empty_trash(outputs)
        return
    references = read_references(outputs, jobs)
    free = (each for each in going if obstacle(outputs, each, references) is None)
    largest = max(free, key=lambda each: each.space.size_bytes, default=None)
    if largest is not None:
        delete_in_place(largest.path)


def pin(outputs: Path, name: str, *, is_pinned: bool) -> list[str]:
    """Pin a run, or all of a sweep, or undo that; the names. Raises `UserError` where there is none of that name."""
    names = [record.name for record in read_runs(outputs, name)]
    for each in names:
        mark = run_directory(outputs, each) / PIN
        try:
            mark.touch() if is_pinned else mark.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{mark} cannot be changed ({error.strerror}); ask whose run it is") from error
    return names
