"""`unclip gc`: removes what no run needs.

What is younger than some hours stays unless it is asked for, since the records may not tell all: a config that was
changed a moment ago may be changed back, and processes of an earlier version do not say what they have planned with.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import UserError, is_disk_full
from pipeline.store.references import read_references
from pipeline.store.removable import Found, Removable, obstacle, removables, split
from pipeline.store.trash import delete_in_place, empty_trash, in_trash, set_aside
from pipeline.workflow.in_use import forget_ended_commands, store_lock
from pipeline.workflow.runs import PIN, read_runs, run_directory

DEFAULT_AGE = "6h"


def find(
    outputs: Path, jobs: Mapping[Path, str], *, older_than_s: float, keeps_checkpoints: bool, takes_caches: bool
) -> Found:
    """Look, and write nothing."""
    references = read_references(outputs, jobs)

    def why_not(each: Removable) -> str | None:
        return obstacle(outputs, each, references) or ("too young" if each.age_s < older_than_s else None)

    found = removables(outputs, references, keeps_checkpoints=keeps_checkpoints, takes_caches=takes_caches)
    return split(found, why_not)


def take_away(outputs: Path, going: Iterable[Removable], jobs: Mapping[Path, str]) -> Found:
    """Take it out of the store, but for what has come into use since it was found. The trash is left to the caller.

    Raises `OSError` on a disk that is full to the last byte: see `make_room`.
    """
    with store_lock(outputs) as owner:
        references = read_references(outputs, jobs)

        def take(each: Removable) -> str | None:
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
            return why

        forget_ended_commands(outputs)
        return split(going, take)


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
