"""One W&B run for the training of one stage, over all its starts."""

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import TrackedArtifacts, TrackingMode
from pipeline.tracking.wandb_record import (
    WandbRecord,
    key_of,
    not_uploaded,
    read_record,
    write_record,
)
from pipeline.tracking.wandb_rows import Arrived, arrived, kept_in_logs
from pipeline.tracking.wandb_session import (
    TellsEnd,
    forget_session,
    fragment_of,
    is_cut_off,
    kill_session,
    open_run,
)
from pipeline.workflow.artifacts import MANIFEST, Artifact, file_sha256
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import EXIT_INTERRUPTED
from pipeline.workflow.record import AXIS

_SECONDS_TO_UPLOAD_AT_A_STOP = 10.0


class Ending(Enum):
    """How a start of the stage ended. One that `LOST` the stage says nothing: the run is another process's now."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    LOST = "lost"


_STATUS = {Ending.FINISHED: 0, Ending.INTERRUPTED: EXIT_INTERRUPTED, Ending.FAILED: 1}


class WandbRun:
    """Sends rows, pictures and lineage to W&B: online, or to files below the work directory that `unclip sync` uploads.

    Nothing that W&B does or fails to do stops training: a fault is a warning in the stage's log. Online, the run of a
    server that is not reached goes to files; so does one whose earlier files are not uploaded yet, as its rows must not
    come before theirs.

    No row is sent twice, however often the stage starts, and none is left out: online the server says how many it has.
    """

    def __init__(self, frozen: FrozenStage) -> None:
        self._frozen = frozen
        self._has = Arrived(frozenset())
        self._skipped = 0
        self._warned_of: set[str] = set()
        self._run: Any = None
        self._record: WandbRecord | None = None

    @classmethod
    def begun(cls, frozen: FrozenStage) -> "WandbRun":
        """For the next start of a stage, in the mode of its config."""
        run = cls(frozen)
        run._guarded(run._begin, "not started")
        return run

    @classmethod
    def settling(cls, frozen: FrozenStage, record: WandbRecord, tells_end: TellsEnd) -> "WandbRun":
        """Online and only so, to send what the server lacks of earlier starts. Raises whatever W&B raises."""
        run = cls(frozen)
        run._adopt(open_run(frozen, record, TrackingMode.ONLINE, tells_end), record)
        return run

    @property
    def untouched(self) -> Path | None:
        """The start whose upload failed before its first row arrived, if one did."""
        return self._has.untouched

    @property
    def is_cut_off(self) -> bool:
        """Whether what is sent now is lost, as W&B's process is gone."""
        return self._run is not None and is_cut_off(self._run)

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

    def finish(self, ending: Ending) -> bool:
        """End this start of the run with the state that it has; whether all of it is where it belongs."""
        if self._run is None:
            return False
        if ending is Ending.LOST:
            self.abandon()
            return False
        # A stop has little time: under Slurm until the job is killed.
        impatience = threading.Timer(_SECONDS_TO_UPLOAD_AT_A_STOP, kill_session)
        if ending is Ending.INTERRUPTED:
            self._guarded(self._run.mark_preempting, "state not sent")
            impatience.start()
        what = f"not all of it was uploaded; it is kept in {self._frozen.work}, and `unclip sync` sends what is missing"
        is_complete = self._guarded(lambda: self._run.finish(exit_code=_STATUS[ending]), what)
        impatience.cancel()
        if is_complete:
            self._guarded(self._close_record, "not recorded")
        else:
            self.abandon()
        return is_complete

    def abandon(self) -> None:
        """End this start as a kill would, without a word to the server."""
        kill_session()
        forget_session()
        self._run = None

    def _close_record(self) -> None:
        # Where another process has taken the stage over, the record is its own.
        record = self._record
        if record is not None and read_record(self._frozen.work) == record:
            is_settled = record.unsettled == record.open_fragment
            closed = replace(record, open_fragment=None, unsettled=None if is_settled else record.unsettled)
            write_record(self._frozen.work, closed)

    def _send(self, row: Mapping[str, Any], content: Callable[[], dict[str, Any]]) -> None:
        if self._run is None or key_of(row) in self._has.rows:
            return
        if self._skipped < self._has.unknown:
            self._skipped += 1
            return
        self._guarded(lambda: self._run.log(content()), "row not sent")

    def _guarded(self, act: Callable[[], object], what: str) -> bool:
        """Do it, and go on if it fails; whether it did not."""
        try:
            act()
        except Exception as error:  # whatever W&B raises, the stage goes on
            if what not in self._warned_of:
                self._warned_of.add(what)
                print(f"warning: W&B: {what} ({_said_by(error)}); training goes on", flush=True)
            return False
        return True

    def _begin(self) -> None:
        work, tracking = self._frozen.work, self._frozen.tracking
        record = read_record(work)
        if record is None:
            name = f"{self._frozen.run}/{self._frozen.stage}"
            record = WandbRecord(secrets.token_hex(8), tracking.project, tracking.entity, self._frozen.group, name)
            write_record(work, record)
        mode = tracking.mode
        if mode is TrackingMode.ONLINE and not_uploaded(work):
            mode = TrackingMode.OFFLINE
            print(
                "W&B: an earlier start is not uploaded yet, so this one is kept in files too; `unclip sync` uploads "
                "both in order, after which starts are online again",
                flush=True,
            )
        try:
            run = open_run(self._frozen, record, mode)
        except Exception as error:
            if mode is TrackingMode.OFFLINE:
                raise
            said = _said_by(error)
            print(f"warning: W&B is not reached ({said}); offline now, `unclip sync` uploads it later", flush=True)
            forget_session()  # it holds the id of the run that it could not start
            run = open_run(self._frozen, record, TrackingMode.OFFLINE)
        self._adopt(run, record)

    def _adopt(self, run: Any, record: WandbRecord) -> None:
        self._run = run
        work, fragment = self._frozen.work, fragment_of(run)
        # The steps of a run are its rows: this is how many the server has.
        self._has = kept_in_logs(work, fragment) if run.offline else arrived(work, record, run.starting_step, fragment)
        self._record = replace(record if run.offline else record.with_upload(fragment), open_fragment=fragment)
        write_record(work, self._record)
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        if not run.offline:
            self._use_inputs()

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


def _said_by(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _artifact_name(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}-{artifact.manifest.fingerprint[:12]}"
