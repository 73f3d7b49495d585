"""The errors that are addressed to users."""

import errno
import shlex
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: one line with the value, the rule and the remedy. Exit status 2, no traceback."""


class DiskFullError(UserError):
    """The disk has, or will have, no room for what is to be written."""


class ProcessKilledError(Exception):
    """One of the processes that train a stage together was ended by a signal: a line says which, and what to do."""


class StageInterrupted(Exception):  # noqa: N818 - a request that was honoured, not a fault
    """A stage stopped at a step boundary on request; its checkpoint is written and the same command resumes it."""


def typed(outputs: Path, *words: str) -> str:
    """The `unclip` command of these words as it is typed to act on the store `outputs`."""
    return shlex.join(["unclip", *words, "--outputs", str(outputs)])


def is_disk_full(error: OSError) -> bool:
    """Whether it tells of a full disk, or of a quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
