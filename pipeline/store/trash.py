"""Removing things in two steps: out of the way at once, by a rename, and then deleted, whenever that may end.

A process that is killed in between leaves a store without them, and trash that the next `unclip gc` deletes. The trash
is beside what it takes, so that it is on the same file system, and where no list of runs or stages looks.
"""

import shutil
from pathlib import Path
from uuid import uuid4

from pipeline.workflow.artifacts import MANIFEST

TRASH = ".trash"
_PLACES = ("", "runs/", "code/", "artifacts/*/", "work/*/")
_OF_STARTS = "artifacts/*/.trash-*"
"""What a start of a stage was deleting when it was killed."""


def set_aside(outputs: Path, path: Path) -> None:
    """Take it out of the store. Raises `OSError` where that is not allowed."""
    parts = path.relative_to(outputs).parts
    trash = outputs.joinpath(*parts[: min(1 if parts[0] == "runs" else 2, len(parts) - 1)]) / TRASH
    trash.mkdir(exist_ok=True)
    path.rename(trash / uuid4().hex)


def in_trash(outputs: Path) -> list[Path]:
    """What was taken out of the store and is not deleted yet."""
    patterns = [*(f"{place}{TRASH}/*" for place in _PLACES), _OF_STARTS]
    return sorted({path for pattern in patterns for path in outputs.glob(pattern)})


def empty_trash(outputs: Path) -> list[Path]:
    """Delete all of it; what is left, for want of a permission."""
    for path in in_trash(outputs):
        _delete(path)
    return in_trash(outputs)


def delete_in_place(path: Path) -> None:
    """Without a rename, for which a full disk may have no room. First goes what says that it is whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    _delete(path)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
