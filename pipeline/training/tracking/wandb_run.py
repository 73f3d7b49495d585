"""One W&B run for the training of one stage, over all its starts."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import TrackedArtifacts, TrackingMode
from pipeline.errors import UserError
from pipeline.training.tracking.wandb_record import RowKey, WandbRecord, key_of, read_record, rows_in, write_record
from pipeline.workflow.artifacts import MANIFEST, Artifact, file_sha256
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.metrics import AXIS
from pipeline.workflow.progress import EXIT_INTERRUPTED
from pipeline.workflow.runs import read_run

_SECONDS_TO_START = 20.0
_SECONDS_TO_UPLOAD_THE_REST = 60.0
_LONGEST_TAG = 64


class Ending(Enum):
    """How a start of the stage ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class WandbRun:
    """Sends rows, pictures and lineage to W&B: online, or to files below the work directory that `unclip sync` uploads.

    Nothing that W&B does or fails to do stops training: a fault is a warning in the stage's log. Online, the run of a
    server that is not reached goes to files.

    No row is sent twice, however often the stage starts: what W&B has is read from its logs on disk, and online is what
    the server says as well. Rows that a kill took from W&B's memory are sent again, as the stage's own record has them;
    only where the server had another row of the same `samples_seen` are they not.
    """

    def __init__(self, frozen: FrozenStage) -> None:
        self._frozen = frozen
        self._has: set[RowKey] = set()
        self._server_has_until = -1
        self._warned_of: set[str] = set()
        self._run: Any = None
        self._record: WandbRecord | None = None
        self._guarded(self._start, "not started")

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row, unless W&B has it."""
        self._send(row, lambda: dict(row))

    def log_picture(self, samples_seen: int, name: str, picture: Path, captions: Sequence[str]) -> None:
        """Send a picture with its captions, unless W&B has it."""

        def content() -> dict[str, Any]:
            import wandb

            with Image.open(picture) as image:
                return {AXIS: samples_seen, name: wandb.Image(image, caption="\n".join(captions))}

        self._send({AXIS: samples_seen, name: picture}, content)

    def summarise(self, metrics: Mapping[str, float]) -> None:
        """Set the final metrics."""
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(dict(metrics)), "summary not sent")

    def log_artifact(self, artifact: Artifact) -> None:
        """Name an artifact as the output: by reference to its directory, or copied where the config asks for that."""
        if self._run is not None:
            self._guarded(lambda: self._run.log_artifact(self._described(artifact)), "artifact not sent")

    def finish(self, ending: Ending) -> None:
        """End this start of the run with the state that it has."""
        if self._run is None:
            return
        if ending is Ending.INTERRUPTED:
            self._guarded(self._run.mark_preempting, "state not sent")
        status = {Ending.FINISHED: 0, Ending.INTERRUPTED: EXIT_INTERRUPTED, Ending.FAILED: 1}[ending]
        self._guarded(lambda: self._run.finish(exit_code=status), "not finished")
        self._guarded(self._close_record, "not recorded")

    def _close_record(self) -> None:
        # Where another process has taken the stage over, the record is its own.
        if self._record is not None and read_record(self._frozen.work) == self._record:
            write_record(self._frozen.work, replace(self._record, open_fragment=None))

    def _send(self, row: Mapping[str, Any], content: Callable[[], dict[str, Any]]) -> None:
        if self._run is None or row[AXIS] <= self._server_has_until or key_of(row) in self._has:
            return
        self._guarded(lambda: self._run.log(content()), "row not sent")

    def _guarded(self, act: Callable[[], object], what: str) -> None:
        try:
            act()
        except Exception as error:  # whatever W&B raises, the stage goes on
            if what not in self._warned_of:
                self._warned_of.add(what)
                print(
                    f"warning: W&B: {what} ({type(error).__name__}: {_first_line(error)}); training goes on", flush=True
                )

    def _start(self) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        work, tracking = self._frozen.work, self._frozen.tracking
        record = read_record(work)
        if record is None:
            name = f"{self._frozen.run}/{self._frozen.stage}"
            record = WandbRecord(secrets.token_hex(8), tracking.project, tracking.entity, self._frozen.group, name)
            write_record(work, record)
        else:
            self._has = rows_in(work)
        config = self._config()
        try:
            self._run = self._init(record, config, tracking.mode)
        except Exception as error:
            if tracking.mode is TrackingMode.OFFLINE:
                raise
            said = _first_line(error)
            print(f"warning: W&B is not reached ({said}); offline now, `unclip sync` uploads it later", flush=True)
            wandb.teardown()  # it holds the id of the run that it could not start
            self._run = self._init(record, config, TrackingMode.OFFLINE)
        self._record = replace(record, open_fragment=Path(self._run.dir).resolve().parent.name)
        write_record(work, self._record)
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)
        if not self._run.offline:
            if self._run.resumed:
                self._server_has_until = int(self._run.summary.get(AXIS, -1))
            self._use_inputs()

    def _init(self, record: WandbRecord, config: dict[str, Any], mode: TrackingMode) -> Any:
        import wandb

        frozen = self._frozen
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
            config=config,
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                init_timeout=_SECONDS_TO_START,
                finish_timeout=_SECONDS_TO_UPLOAD_THE_REST,
            ),
            reinit="finish_previous",
        )

    def _config(self) -> dict[str, Any]:
        """The frozen stage, the run's whole config, and where the inputs come from."""
        frozen = self._frozen
        config: dict[str, Any] = {**frozen.model_dump(mode="json"), "lineage": self._lineage()}
        try:
            run = read_run(frozen.outputs, frozen.run)
        except UserError:
            return config
        # The run may have been given another config since this stage was frozen.
        if run.fingerprint_of(frozen.stage) == frozen.fingerprint:
            config["run_config"] = run.config
        return config

    def _lineage(self) -> dict[str, list[dict[str, Any]]]:
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
            for name, artifacts in self._frozen.find_inputs().items()
        }

    def _use_inputs(self) -> None:
        """Link the inputs in W&B; offline it has no call for that, and the config's `lineage` says it."""
        for artifacts in self._frozen.find_inputs().values():
            for artifact in artifacts:
                tracking = artifact.manifest.tracking
                if tracking:
                    place = "/".join(part for part in (tracking.get("entity"), tracking["project"]) if part)
                    name = f"{place}/{_artifact_name(artifact)}:latest"
                    self._guarded(lambda name=name: self._run.use_artifact(name), f"input {name} not linked")

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
            described.add_dir(str(artifact.path))
        else:
            # The manifest has the digests of the files; W&B's own would have it read all of them.
            described.add_reference(artifact.path.absolute().as_uri(), checksum=False)
        return described


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _artifact_name(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}-{artifact.manifest.fingerprint[:12]}"
