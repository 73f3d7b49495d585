"""Opens a stage's W&B run, and ends the process of W&B's own (`wandb-core`) that sends for it."""

import contextlib
import os
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import TrackingMode
from pipeline.tracking.wandb_record import WandbRecord
from pipeline.workflow.artifacts import MANIFEST, file_sha256
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.runs import config_with

_SECONDS_TO_START = 20.0
_SECONDS_TO_UPLOAD_THE_REST = 60.0
_SECONDS_IN_MEMORY = 1.0
_SECONDS_TO_DIE = 5.0
_LONGEST_TAG = 64


class TellsEnd(Enum):
    """Whether the server is told how a start of a run ended; of one that is not it takes the run for crashed."""

    YES = True
    NO = False


def open_run(frozen: FrozenStage, record: WandbRecord, mode: TrackingMode, tells_end: TellsEnd = TellsEnd.YES) -> Any:
    """A W&B run that goes on where its last start ended. Raises whatever W&B raises."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    tags = dict.fromkeys((frozen.run, record.group, frozen.stage, frozen.kind))
    return wandb.init(
        id=record.id,
        resume="allow",
        project=record.project,
        entity=record.entity,
        group=record.group,
        job_type=frozen.stage,
        name=record.name,
        tags=[tag[:_LONGEST_TAG] for tag in tags],
        mode="online" if mode is TrackingMode.ONLINE else "offline",
        dir=str(frozen.work),
        config=_config(frozen),
        settings=wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            init_timeout=_SECONDS_TO_START,
            finish_timeout=_SECONDS_TO_UPLOAD_THE_REST,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_SECONDS_IN_MEMORY,
            x_update_finish_state=tells_end.value,
        ),
        reinit="finish_previous",
    )


def fragment_of(run: Any) -> str:
    """The directory of this start's log, by its name."""
    return Path(run.dir).resolve().parent.name


def is_cut_off(run: Any) -> bool:
    """Whether W&B's process is gone: Slurm signals all processes of a job, and this one does not outlive a TERM."""
    try:
        run.status()
    except Exception:  # it has several for a lost connection
        return True
    return False


def forget_session() -> None:
    """End W&B's process in order, after which a run can be opened anew."""
    import wandb

    # Of a process that did not end by itself it raises, or asks this one to exit; it is forgotten all the same.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def kill_session() -> None:
    """End W&B's process at once: it sends and writes no more, as if this process had been killed."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
                child.wait(_SECONDS_TO_DIE)


def _config(frozen: FrozenStage) -> dict[str, Any]:
    """The frozen stage, the run's whole config, and where the inputs come from."""
    config: dict[str, Any] = {**frozen.model_dump(mode="json"), "lineage": _lineage(frozen)}
    run_config = config_with(frozen.outputs, frozen.run, frozen.stage, frozen.fingerprint)
    return config if run_config is None else {**config, "run_config": run_config}


def _lineage(frozen: FrozenStage) -> dict[str, list[dict[str, Any]]]:
    """Each input's artifacts: which, the SHA-256 of the manifest (it has those of all files), who made it."""
    return {
        name: [
            {
                "stage": artifact.manifest.stage,
                "fingerprint": artifact.manifest.fingerprint,
                "manifest_sha256": file_sha256(artifact.path / MANIFEST),
                "made_by_run": artifact.manifest.made_by_run,
                "wandb_id": artifact.manifest.tracking.get("wandb_id"),
            }
            for artifact in artifacts
        ]
        for name, artifacts in frozen.find_inputs().items()
    }
