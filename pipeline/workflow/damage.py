"""What is said of a damaged artifact, with what can be done, and what is remembered of it."""

from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.config import Settings
from pipeline.errors import UserError, typed
from pipeline.workflow.sealed import read_or_none, write_json_atomically

FOUND_DAMAGED = "damage.json"
"""In the work directory: which file was found damaged. It counts for as long as the artifact is not there."""
REMEDY_ELSEWHERE = (
    "it is in another store: run it again with store.on_damage=rebuild to make it here, or once its owner has mended it"
)


class DamagedArtifactError(UserError):
    """A file of an artifact is not what its manifest says; `fault` says which, and how it differs."""

    def __init__(self, fault: str, remedy: str, consequence: str = "") -> None:
        super().__init__(f"{fault}{consequence}; {remedy}")
        self.fault = fault


def remedy_at(directory: Path) -> str:
    """What can be done about damage of an artifact there: in others' stores, which are linked to, it is theirs."""
    if directory.is_symlink():
        return REMEDY_ELSEWHERE
    verify = typed(directory.parents[2], "verify", "--all")
    return (
        "run it again with store.on_damage=rebuild to make it anew, or put an intact copy of the file there, and this "
        f"takes it back: {verify}"
    )


class _FoundDamaged(Settings):
    fault: str


_FOUND_DAMAGED = TypeAdapter(_FoundDamaged)


def remember(work: Path, fault: str) -> None:
    """Keep in a stage's work directory what was found wrong with its artifact."""
    with suppress(OSError):  # a full disk, or a store of others': it is found again
        work.mkdir(parents=True, exist_ok=True)
        write_json_atomically(work / FOUND_DAMAGED, {"fault": fault})


def remembered(work: Path) -> str | None:
    """What was found wrong, or None."""
    found = read_or_none(_FOUND_DAMAGED, work / FOUND_DAMAGED, "it is left out")
    return None if found is None else found.fault
