"""Which W&B run belongs to a stage and what its starts sent: `wandb.json` and W&B's logs in the work directory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.tracking.wandb_log import HEAD_BYTES
from pipeline.workflow.artifacts import write_json_atomically
from pipeline.workflow.record import AXIS, without_measured

RECORD = "wandb.json"

RowKey = tuple[int, frozenset[str]]
"""What tells a row from the others of its stage: `samples_seen`, and the names of what does not change on a repeat."""


@dataclass(frozen=True)
class WandbRecord:
    """A W&B run. It keeps the group and the name of the run that began it, whoever goes on with it.

    Starts are named by the directories of their logs. `open_fragment` is the one that a process writes to, or wrote to
    when it was killed. `uploads` are those that have sent rows to the server, in the order in which they did, and
    `unsettled` is the last of them as long as the server may lack a part of it.
    """

    id: str
    project: str
    entity: str | None
    group: str
    name: str
    open_fragment: str | None = None
    unsettled: str | None = None
    uploads: tuple[str, ...] = ()

    def published(self) -> dict[str, Any]:
        """What a manifest keeps of it, so that runs which use the artifact can name the one that made it."""
        return {"wandb_id": self.id, "project": self.project, "entity": self.entity}

    def with_upload(self, fragment: str) -> "WandbRecord":
        """The record once that start begins to send."""
        return replace(self, uploads=(*self.uploads, fragment), unsettled=fragment)


def read_record(work: Path) -> WandbRecord | None:
    """The W&B run of the stage in that work directory, or None."""
    try:
        values = json.loads((work / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return WandbRecord(**{**values, "uploads": tuple(values.get("uploads", ()))})


def write_record(work: Path, record: WandbRecord) -> None:
    """Keep it, flushed to disk."""
    write_json_atomically(work / RECORD, asdict(record))


def fragments(work: Path) -> list[Path]:
    """The logs (`*.wandb`) of all starts of the stage's W&B run, the first start first.

    Of a start that was killed before W&B wrote anything there is but the file's head.
    """
    logs = [log for log in (work / "wandb").glob("*run-*/*.wandb") if log.stat().st_size > HEAD_BYTES]
    return sorted(logs, key=started)


def started(log: Path) -> str:
    """What orders logs by their start: W&B names their directories by its second, with `offline-` before it or not."""
    return log.parent.name.removeprefix("offline-")


def is_offline(log: Path) -> bool:
    """Whether the rows of that start went to its log alone."""
    return log.parent.name.startswith("offline-")


def mark_of(log: Path) -> Path:
    """The file that `wandb sync` leaves beside a log that it has uploaded."""
    return log.with_suffix(".wandb.synced")


def not_uploaded(work: Path) -> list[Path]:
    """The logs of offline starts that are not uploaded in full, the first start first."""
    return [log for log in fragments(work) if is_offline(log) and not mark_of(log).exists()]


def key_of(row: Mapping[str, Any]) -> RowKey:
    """The key of a row, ours or as W&B gives it back: with columns of its own, and the parts of a picture apart."""
    names = (name.removesuffix("._type") for name in without_measured(row))
    return int(row[AXIS]), frozenset(name for name in names if name != AXIS and name[0] != "_" and not _is_part(name))


def _is_part(name: str) -> bool:
    stem, _, part = name.rpartition(".")
    return bool(stem) and part in ("caption", "format", "height", "path", "sha256", "size", "width")
