"""Where an export goes: a directory that is whole, or not there. Imports no torch."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError

RECORD = "export.json"
"""Stands in every directory that `unclip export` has written, and in no other."""


@contextmanager
def written_whole(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory beside `target` to write into, which takes its place when the block ends without an error.

    With `overwrite` an earlier export gives way to it; nothing else ever does.

    Raises:
        UserError: `target` is a file, is not empty, or cannot be written. At once, before the block.
    """
    target = Path(os.path.realpath(target))
    _check(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); give a directory that can") from error
    try:
        yield building
        # Temporary directories are their owner's alone, and libraries write their files so.
        mask = _umask()
        for path in (building, *building.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _replace(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _check(target: Path, overwrite: bool) -> None:
    try:
        content = [each.name for each in target.iterdir()]
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise UserError(f"{target} is a file, or lies below one; give a directory") from error
    except OSError as error:
        raise UserError(f"{target} cannot be read ({error.strerror}); give a directory that can") from error
    if content and RECORD not in content:
        raise UserError(f"{target} is not empty and holds no earlier export; give a new or an empty directory")
    if content and not overwrite:
        raise UserError(f"{target} holds an earlier export; give --overwrite to replace it, or another directory")


def _replace(building: Path, target: Path) -> None:
    """Put a whole directory in the place of an earlier export, an empty directory or nothing."""
    if not (target / RECORD).exists():
        building.rename(target)
        return
    earlier = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    target.rename(earlier)
    building.rename(target)
    shutil.rmtree(earlier)


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
