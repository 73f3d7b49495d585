"""What the report reads of runs: each stage's state, cost, metrics and hardware, finished or not."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.config import INTEGER_LIMIT
from pipeline.errors import UserError
from pipeline.report.rows import VALIDATION, elapsed, sampled_rows
from pipeline.terminal.tables import DAMAGED, stage_state
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.progress import latest_checkpoint_samples, read_hardware, read_progress
from pipeline.workflow.record import METRICS
from pipeline.workflow.runs import RunRecord, RunStage, read_run, store_of

ROWS_SO_FAR = 100
_SECONDS_PER_HOUR = 3600


class State(StrEnum):
    """Where a stage or a whole run stands."""

    FINISHED = "finished"
    RUNNING = "running"
    STARTING = "starting"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    DAMAGED = DAMAGED
    WAITING = "waiting"


_MOST_TELLING_FIRST = (
    State.FAILED, State.DAMAGED, State.RUNNING, State.STARTING, State.STOPPED, State.INTERRUPTED, State.WAITING,
)  # fmt: skip


@dataclass(frozen=True)
class StageReport:
    """One stage under one fingerprint; several runs may stand behind it.

    `duration_s` is None where nothing says how long it has worked. `devices` counts those of all nodes. `metrics` are
    the final ones, numbers only; a stage in progress has the last validation's. `detail` is a line on its state.
    """

    name: str
    kind: str
    fingerprint: str
    upstream: tuple[str, ...]
    state: State
    detail: str
    samples_seen: int
    duration_s: float | None
    device_s: float | None
    devices: int
    metrics: Mapping[str, float]
    hardware: Mapping[str, Any]
    work: Path
    artifact: Artifact | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its artifact is there."""
        return self.artifact is not None

    @property
    def device_hours(self) -> float | None:
        """Its cost: devices times hours, over all starts, whatever devices each had."""
        return None if self.device_s is None else self.device_s / _SECONDS_PER_HOUR

    @property
    def rows_path(self) -> Path:
        """Its `metrics.jsonl`, which may not exist."""
        return (self.artifact.path if self.artifact else self.work) / METRICS

    @property
    def directory(self) -> Path:
        """The artifact, or what there is of it in progress."""
        return self.artifact.path if self.artifact else self.work


@dataclass(frozen=True)
class RunReport:
    """A run and its stages, in workflow order."""

    record: RunRecord
    stages: tuple[StageReport, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.name

    @property
    def catalog(self) -> str:
        """Where the run's classes of stages are declared; "" in a record that does not say."""
        return str(self.record.config.get("catalog", ""))

    @property
    def state(self) -> State:
        """The most telling of its stages' states; finished when all are."""
        states = {stage.state for stage in self.stages}
        return next((state for state in _MOST_TELLING_FIRST if state in states), State.FINISHED)

    def stage(self, name: str) -> StageReport | None:
        """Its stage of that name, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)


@dataclass(frozen=True)
class Comparison:
    """Runs to be compared, read once; `users` says which of them stand behind a fingerprint."""

    outputs: Path
    runs: tuple[RunReport, ...]
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def stage_names(self) -> list[str]:
        """The stages of all runs, each run's in workflow order."""
        return list(dict.fromkeys(stage.name for run in self.runs for stage in run.stages))

    @property
    def distinct_stages(self) -> list[StageReport]:
        """Every stage once, however many runs share it."""
        return list({stage.fingerprint: stage for run in self.runs for stage in run.stages}.values())

    def is_common(self, name: str) -> bool:
        """Whether all runs have one and the same artifact behind a stage's name."""
        found = {stage.fingerprint if stage else None for stage in (run.stage(name) for run in self.runs)}
        return len(found) == 1

    def only(self, names: Collection[str]) -> "Comparison":
        """The runs of those names; what others share with them is still known."""
        return Comparison(self.outputs, tuple(run for run in self.runs if run.name in names), self.users)

    def count_distinct(self, name: str) -> int:
        """How many stages stand behind a stage's name."""
        return sum(stage.name == name for stage in self.distinct_stages)

    def shared_with(self, run: RunReport, stage: StageReport) -> list[str]:
        """The other compared runs that have this very stage."""
        return [name for name in self.users[stage.fingerprint] if name != run.name]


def read_comparison(outputs: Path, records: Sequence[RunRecord]) -> Comparison:
    """Read all that a report of these runs needs; a stage that several share is read once."""
    store = store_of(outputs, records)
    known: dict[str, StageReport] = {}
    users: dict[str, list[str]] = {}
    runs = []
    for record in records:
        for stage in record.stages:
            if stage.fingerprint not in known:
                known[stage.fingerprint] = _read_stage(store, record, stage)
            users.setdefault(stage.fingerprint, []).append(record.name)
        runs.append(RunReport(record, tuple(known[stage.fingerprint] for stage in record.stages)))
    return Comparison(outputs, tuple(runs), {fingerprint: tuple(names) for fingerprint, names in users.items()})


def _read_stage(store: ArtifactStore, record: RunRecord, stage: RunStage) -> StageReport:
    work = store.work(stage.name, stage.fingerprint)
    artifact = store.readable(stage.name, stage.fingerprint)
    state, detail = stage_state(store, stage)
    if artifact is not None:
        manifest = artifact.manifest
        hardware: Mapping[str, Any] = manifest.hardware
        maker = record if hardware else _maker(store.outputs, manifest.made_by_run) or record
        metrics, samples_seen, duration_s = manifest.metrics, manifest.samples_seen, manifest.duration_s
        device_s = manifest.device_s
    else:
        maker, hardware = record, read_hardware(work)
        metrics, samples_seen, duration_s = _so_far(work)
        progress = read_progress(work)
        device_s = progress.device_s if progress else None
    devices = _devices(hardware, maker.config, stage.name)
    if device_s is None and duration_s is not None:
        device_s = duration_s * devices
    return StageReport(
        name=stage.name,
        kind=stage.kind,
        fingerprint=stage.fingerprint,
        upstream=tuple(stage.upstream),
        state=State(state),
        detail=detail,
        samples_seen=samples_seen,
        duration_s=duration_s,
        device_s=device_s,
        devices=devices,
        metrics={name: float(value) for name, value in metrics.items() if _is_number(value)},
        hardware=hardware,
        work=work,
        artifact=artifact,
    )


def _so_far(work: Path) -> tuple[dict[str, float], int, float | None]:
    """The last validation, the counter and the seconds of a stage in progress."""
    metrics: dict[str, float] = {}
    elapsed_s = None
    for row in sampled_rows(work / METRICS, ROWS_SO_FAR).rows:
        metrics |= {name.removeprefix(VALIDATION): row[name] for name in row if name.startswith(VALIDATION)}
        elapsed_s = elapsed(row, elapsed_s)
    progress = read_progress(work)
    samples_seen = progress.samples_seen if progress else latest_checkpoint_samples(work) or 0
    if elapsed_s is None and progress is not None and progress.started_at:
        elapsed_s = max(0.0, progress.updated_at - progress.started_at)
    return metrics, samples_seen, elapsed_s


def _devices(hardware: Mapping[str, Any], config: Mapping[str, Any], stage: str) -> int:
    """Devices of all nodes: as recorded, else as the config of the run that made the stage asks for."""
    if "devices" in hardware:
        return _count(hardware, "devices")
    trainer = {**config.get("trainer", {}), **(config.get("stage", {}).get(stage, {}).get("trainer") or {})}
    return _count(trainer, "devices") * _count(trainer, "num_nodes")


def _count(values: Mapping[str, Any], name: str) -> int:
    """A number of things; 1 where the record does not say, or says what is none."""
    value = values.get(name, 1)
    return value if isinstance(value, int) and 0 < value < INTEGER_LIMIT else 1


def _maker(outputs: Path, name: str) -> RunRecord | None:
    try:
        return read_run(outputs, name)
    except UserError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < INTEGER_LIMIT
    )
