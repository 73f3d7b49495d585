"""Why a start of a stage ended without its result: one list of causes for every launcher, and the record of ends."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.workflow.sealed import lines_of, read_line, sealed_line, warn_of_damaged_lines

ENDS = "ends.jsonl"


class Cause(StrEnum):
    """What ended a start. `stopped` was asked for; `settings` is what the config or the inputs have wrong."""

    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_DEVICE_MEMORY = "out_of_device_memory"
    TIME_LIMIT = "time_limit"
    NODE_FAILURE = "node_failure"
    LAUNCH = "launch"
    COLLECTIVE = "collective"
    DATA = "data"
    DISK_FULL = "disk_full"
    PERMISSION = "permission"
    STOPPED = "stopped"
    SETTINGS = "settings"
    UNKNOWN = "unknown"

    @property
    def words(self) -> str:
        """For people."""
        return self.value.replace("_", " ")

    @property
    def may_be_the_node(self) -> bool:
        """Whether another node may do better."""
        return self in (Cause.NODE_FAILURE, Cause.LAUNCH, Cause.COLLECTIVE, Cause.UNKNOWN)


@dataclass(frozen=True)
class End:
    """A start of a stage on `nodes`: `cause` is None as long as nothing is known of its end.

    `job` and `start` say which start of which batch job it was, `then` what was done about it.
    """

    job: str
    start: int
    nodes: str
    cause: Cause | None = None
    message: str = ""
    then: str = ""


_END = TypeAdapter(End)


def write_end(work: Path, end: End) -> None:
    """Add a line to the record of that work directory."""
    with (work / ENDS).open("ab") as file:
        file.write(sealed_line(asdict(end)))


def read_ends(work: Path) -> list[End]:
    """Every start that was recorded, with the last word on it; damaged lines are left out, and said.

    One of which nothing was heard before its job started again was ended by the loss of its node.
    """
    found: dict[tuple[str, int], End] = {}
    damaged = 0
    try:
        lines = lines_of(work / ENDS).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            end = _END.validate_python(read_line(line))
        except ValidationError:
            damaged += 1
            continue
        found[end.job, end.start] = end
    warn_of_damaged_lines(work / ENDS, damaged)
    latest = dict(sorted(found))
    return [
        End(end.job, end.start, end.nodes, Cause.NODE_FAILURE, "it ended without a word")
        if end.cause is None and end.start < latest[end.job]
        else end
        for end in found.values()
    ]


def last_words(work: Path, job: str) -> str:
    """The cause of the job's last start that ended without a result, and what was done about it; empty without one."""
    ends = [end for end in read_ends(work) if end.cause is not None and end.job == job]
    if not ends:
        return ""
    last = ends[-1]
    assert last.cause is not None, "chosen so"
    where = f" on {last.nodes}" if last.cause.may_be_the_node and last.nodes else ""
    return f"{last.cause.words}{where}{f': {last.then}' if last.then else ''}"


def starts_again(times: Mapping[Cause, int], cause: Cause, earlier: Sequence[Cause | None]) -> str | None:
    """`2 of 3` where a failure of that cause is to be followed by another start, its second of three; else None."""
    number = 1 + earlier.count(cause)
    return f"{number} of {times[cause]}" if number <= times.get(cause, 0) else None


def oom_kills() -> int:
    """How many processes this machine's kernel has ended for want of memory; 0 where it keeps no count."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
