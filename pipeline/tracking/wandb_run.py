"""A stage's record as one W&B run, over all starts of the stage, by W&B's public interface alone."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Any

from PIL import Image

from pipeline.config import TrackedArtifacts
from pipeline.tracking.wandb_record import WandbRecord, read_record, write_record
from pipeline.workflow.artifacts import MANIFEST, Artifact
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import EXIT_INTERRUPTED
from pipeline.workflow.record import AXIS, PICTURE, Entry, Replay
from pipeline.workflow.runs import config_with
from pipeline.workflow.sealed import opened

SCRATCH = "wandb-scratch"
"""In the work directory: files of W&B's client, of which nothing is needed once its process has ended."""

_SECONDS_TO_START = 20.0
_LONGEST_TAG = 64


class Ending(StrEnum):
    """How a start of a stage ended. Of `OPEN` the server is told nothing: the stage is to go on."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    OPEN = "open"


_STATUS = {Ending.FINISHED: 0, Ending.INTERRUPTED: EXIT_INTERRUPTED, Ending.FAILED: 1, Ending.OPEN: 1}


class WandbRun:
    """Sends what the server lacks of the record. The server says where its history ends when the run is opened.

    Raises whatever W&B raises, above all where the server is not reached.
    """

    def __init__(self, frozen: FrozenStage, ending: Ending | None) -> None:
        """`ending` is how the stage ended, where that is known; else the process above this one works on the stage."""
        record = read_record(frozen.work)
        assert record is not None, "it is written before anything is sent"
        self._frozen = frozen
        self._record = record
        self._replay = Replay(frozen.work)
        self._run = _open(frozen, record, ending)
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)
        self._use_inputs()

    def send(self) -> None:
        """Send the entries that were added to the record since the last call, but for those that the server has."""
        for step, entry in self._replay.new():
            if step >= self._run.starting_step:
                self._run.log(self._content(entry), step=step, commit=True)

    def finish(self, ending: Ending) -> None:
        """End the run with that state, once the server has all of it, and note that it has."""
        if ending is Ending.FINISHED:
            self._tell_of_artifact()
        if ending is Ending.INTERRUPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=_STATUS[ending])
        write_record(self._frozen.work, replace(self._record, sent=self._replay.count, told=ending.value))
        shutil.rmtree(self._frozen.work / SCRATCH, ignore_errors=True)

    def _content(self, entry: Entry) -> dict[str, Any]:
        """The entry as W&B's client takes it; of a picture that is gone there is its place alone."""
        import wandb

        if PICTURE not in entry:
            return entry
        content: dict[str, Any] = {AXIS: entry[AXIS]}
        place = self._frozen.work / entry["file"]
        with suppress(Exception), opened(place) as file, Image.open(file) as image:  # Pillow raises all sorts
            content[entry[PICTURE]] = wandb.Image(image, caption="\n".join(entry["captions"]))
        return content

    def _tell_of_artifact(self) -> None:
        """Set the final metrics, and name the artifact as the output: by reference, or copied where the config says."""
        artifact = self._frozen.store.find(self._frozen.stage, self._frozen.fingerprint)
        if artifact is not None:
            self._run.summary.update(artifact.manifest.metrics)
            _try(lambda: self._run.log_artifact(self._described(artifact)), "artifact not sent")

    def _use_inputs(self) -> None:
        for artifacts in self._frozen.find_inputs().values():
            for artifact in artifacts:
                tracking = artifact.manifest.tracking
                if tracking:
                    place = "/".join(part for key in ("entity", "project") if (part := tracking.get(key)))
                    name = f"{place}/{_artifact_name(artifact)}:latest"
                    _try(lambda name=name: self._run.use_artifact(name), f"input {name} not linked")

    def _described(self, artifact: Artifact) -> Any:
        import wandb

        manifest = artifact.manifest
        metadata = {
            "stage": manifest.stage,
            "fingerprint": manifest.fingerprint,
            "manifest_sha256": file_sha256(artifact.path / MANIFEST),
            "inputs": manifest.inputs,
            "metrics": manifest.metrics,
        }
        described = wandb.Artifact(_artifact_name(artifact), type=manifest.kind, metadata=metadata)
        if self._frozen.tracking.artifacts is TrackedArtifacts.COPY:
            described.add_dir(str(artifact.opened().path))
        else:
            # The manifest has the digests of the files; W&B's own would have it read all of them.
            described.add_reference(artifact.path.absolute().as_uri(), checksum=False)
        return described


def said_by(error: BaseException) -> str:
    """An error in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _open(frozen: FrozenStage, record: WandbRecord, ending: Ending | None) -> Any:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    scratch = frozen.work / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    # W&B's own measurements are of the process that trains, or of none: another machine may be sending.
    measures: dict[str, Any] = (
        {"x_stats_pid": os.getppid()} if ending is None else {"x_disable_stats": True, "x_disable_meta": True}
    )
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
        mode="online",
        dir=str(scratch),
        config=_config(frozen),
        settings=wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            init_timeout=_SECONDS_TO_START,
            x_update_finish_state=ending is not Ending.OPEN,
            **measures,
        ),
    )


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


def _try(act: Callable[[], object], what: str) -> None:
    """Do what the run is good without."""
    try:
        act()
    except Exception as error:
        print(f"warning: W&B: {what} ({said_by(error)})", flush=True)


def _artifact_name(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}-{artifact.manifest.fingerprint[:12]}"
