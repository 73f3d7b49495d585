"""Which W&B run belongs to a stage, and what W&B has of it: `wandb.json` and W&B's own logs in the work directory."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.workflow.artifacts import write_json_atomically
from pipeline.workflow.metrics import AXIS, without_measured

RECORD = "wandb.json"
_HEAD_BYTES = 7
WANDB_PROGRAM = (sys.executable, "-m", "wandb")

RowKey = tuple[int, frozenset[str]]
"""What tells a row from the others of its stage: `samples_seen`, and the names of what does not change on a repeat."""


@dataclass(frozen=True)
class WandbRecord:
    """A W&B run. It keeps the group and the name of the run that began it, whoever goes on with it.

    `open_fragment` is the directory that a process writes to, or wrote to when it was killed.
    """

    id: str
    project: str
    entity: str | None
    group: str
    name: str
    open_fragment: str | None = None

    def published(self) -> dict[str, Any]:
        """What a manifest keeps of it, so that runs which use the artifact can name the one that made it."""
        return {"wandb_id": self.id, "project": self.project, "entity": self.entity}


def read_record(work: Path) -> WandbRecord | None:
    """The W&B run of the stage in that work directory, or None."""
    try:
        return WandbRecord(**json.loads((work / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_record(work: Path, record: WandbRecord) -> None:
    """Keep it, flushed to disk."""
    write_json_atomically(work / RECORD, asdict(record))


def fragments(work: Path) -> list[Path]:
    """The logs (`*.wandb`) of all starts of the stage's W&B run, the first start first.

    Of a start that was killed before W&B wrote anything there is but the file's head.
    """
    logs = [log for log in (work / "wandb").glob("*run-*/*.wandb") if log.stat().st_size > _HEAD_BYTES]
    return sorted(logs, key=started)


def started(log: Path) -> str:
    """What orders logs by their start: W&B names their directories by its second, with `offline-` before it or not."""
    return log.parent.name.removeprefix("offline-")


def rows_in(work: Path) -> set[RowKey]:
    """The rows that W&B has on disk, of all starts. A log that a kill cut short is read as far as it goes."""
    return {key_of(row) for log in fragments(work) for row in _history(log)}


def key_of(row: Mapping[str, Any]) -> RowKey:
    """The key of a row, ours or as W&B gives it back: with columns of its own, and the parts of a picture apart."""
    names = (name.removesuffix("._type") for name in without_measured(row))
    return int(row[AXIS]), frozenset(name for name in names if name != AXIS and name[0] != "_" and not _is_part(name))


def _is_part(name: str) -> bool:
    stem, _, part = name.rpartition(".")
    return bool(stem) and part in ("caption", "format", "height", "path", "sha256", "size", "width")


def _history(log: Path) -> Iterator[dict[str, Any]]:
    said = subprocess.run([*WANDB_PROGRAM, "leet", "inspect", "--json", str(log)], capture_output=True, check=False)
    for line in said.stdout.splitlines():
        record = json.loads(line)
        if record.get("type") == "history" and AXIS in record["history"]["item"]:
            yield record["history"]["item"]
