"""Which W&B run belongs to a stage, and how much of the stage's record it has: `wandb.json` in the work directory."""

import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.sealed import read_or_none, write_json_atomically

WANDB = "wandb.json"


@dataclass(frozen=True)
class WandbRecord:
    """A W&B run. It keeps the group and the name of the run that began it, whoever goes on with it.

    `began_at` is in seconds since 1970. The run has the first `sent` entries of the record for certain, and was told
    that the stage ended as `told` says; the server may have more.
    """

    id: str
    project: str
    entity: str | None
    group: str
    name: str
    began_at: float
    sent: int = 0
    told: str | None = None

    def published(self) -> dict[str, Any]:
        """What a manifest keeps of it, so that runs which use the artifact can name the one that made it."""
        return {"wandb_id": self.id, "project": self.project, "entity": self.entity}


_RECORD = TypeAdapter(WandbRecord)


def begun(frozen: FrozenStage) -> WandbRecord:
    """A new W&B run for a stage."""
    tracking, name = frozen.tracking, f"{frozen.run}/{frozen.stage}"
    return WandbRecord(secrets.token_hex(8), tracking.project, tracking.entity, frozen.group, name, time.time())


def read_record(work: Path) -> WandbRecord | None:
    """The W&B run of the stage in that work directory, or None."""
    return read_or_none(_RECORD, work / WANDB, "a new W&B run takes the stage's whole record")


def write_record(work: Path, record: WandbRecord) -> None:
    """Keep it, flushed to disk."""
    write_json_atomically(work / WANDB, asdict(record))
