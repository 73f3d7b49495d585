"""Tables of plans, runs and their stages."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.terminal.words import format_duration, members_shown, progress_line
from pipeline.workflow.artifacts import Artifact, ArtifactStore
from pipeline.workflow.causes import Cause
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.ownership import TAKEN_AWAY, was_published
from pipeline.workflow.plan import Plan
from pipeline.workflow.progress import LOG, Phase, latest_checkpoint_samples, read_failure, read_progress
from pipeline.workflow.runs import RunRecord, RunStage, run_artifacts, stages_with_members, store_of

DAMAGED = "damaged"
"""The state of what was finished and is not what its manifest says."""
WAITING = "waiting"
"""The state of what was never begun."""
SHOWN_METRICS = 4
_COLUMNS_OF_A_FILE = 160
_WRAPPED = ("why", "needs", "metrics", "progress", "reason", "after", "resources")


def plan_table(plan: Plan) -> Table:
    """What will happen to each stage, and why."""
    table = new_table(f"plan of run {plan.config.run.name}", "stage", "action", "why", "needs", "fingerprint")
    for stage in plan.stages:
        needs = ", ".join(stage.upstream)
        table.add_row(stage.name, stage.action.value, stage.reason, needs, (stage.fingerprint or "")[:12])
    return table


def result_table(outputs: Path, record: RunRecord) -> Table:
    """The finished stages of a run with time and metrics."""
    table = new_table(f"run {record.name}", "stage", "time", "samples", "metrics")
    for name, artifact in run_artifacts(outputs, record).items():
        manifest = artifact.manifest
        samples = f"{manifest.samples_seen:,}" if manifest.samples_seen else ""
        table.add_row(name, format_duration(manifest.duration_s), samples, metrics_line(artifact))
    return table


def metrics_line(artifact: Artifact) -> str:
    """An artifact's first metrics, `name value`, in the order in which the stage gave them."""
    metrics = list(artifact.manifest.metrics.items())
    shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics]
    more = [f"+{len(shown) - SHOWN_METRICS}"] if len(shown) > SHOWN_METRICS else []
    return ", ".join([*shown[:SHOWN_METRICS], *more])


def status_table(outputs: Path, records: Sequence[RunRecord], title: str) -> Table:
    """Where each stage of some runs stands, once, from its files alone; the column of members only for several."""
    store, several = store_of(outputs, records), len(records) > 1
    table = new_table(title, "stage", *(["member"] if several else []), "state", "progress", "fingerprint")
    for stage, members in stages_with_members(records):
        member = [members_shown(members)] if several else []
        table.add_row(stage.name, *member, *stage_state(store, stage), stage.fingerprint[:12])
    return table


def unfinished_logs(outputs: Path, records: Sequence[RunRecord]) -> list[Path]:
    """Logs of the stages that were started and are not finished."""
    store = ArtifactStore(outputs)
    logs = [
        store.work(stage.name, stage.fingerprint) / LOG
        for stage, _ in stages_with_members(records)
        if store.readable(stage.name, stage.fingerprint) is None
    ]
    return [log for log in logs if log.exists()]


def new_console() -> Console:
    """What commands print to. In a pipe or a file, tables are as wide as `COLUMNS` says, else wide enough for most."""
    is_told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_told else _COLUMNS_OF_A_FILE)


def new_table(title: str, *columns: str, wraps: bool = False) -> Table:
    """An empty table in the style of all of ours. Numbers go on in a second line only where it `wraps`."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place == 0 or not (wraps or column in _WRAPPED))
    return table


def stage_state(store: ArtifactStore, stage: RunStage) -> tuple[str, str]:
    """(state, detail) of one stage."""
    try:
        artifact = store.own(stage.name, stage.fingerprint)
        damage = None if artifact is None else artifact.seen_damage()
    except DamagedArtifactError as error:
        artifact, damage = None, error
    if damage is not None:
        return DAMAGED, str(damage)
    if artifact is not None:
        others = store.made_anew_since(artifact.manifest.inputs_sha256)
        parts = format_duration(artifact.manifest.duration_s), metrics_line(artifact), others
        return "finished", " · ".join(filter(None, parts))
    work = store.work(stage.name, stage.fingerprint)
    failure = read_failure(work)
    if failure is not None:
        known = "" if failure.cause is Cause.UNKNOWN else f"{failure.cause.words}: "
        return Phase.FAILED.value, f"{known}{failure.message}"
    progress = read_progress(work)
    if progress is None or progress.is_silent:
        damage = store.known_damage(stage.name, stage.fingerprint)
        if damage is not None:
            return DAMAGED, str(damage)
    if was_published(work):
        return DAMAGED, f"{store.path(stage.name, stage.fingerprint)} {TAKEN_AWAY}"
    if progress is None:
        return WAITING, ""
    if progress.phase in (Phase.INTERRUPTED, Phase.FAILED):
        return progress.phase.value, progress_line(progress)
    if progress.is_silent:
        samples_seen = latest_checkpoint_samples(work)
        kept = "no checkpoint yet" if samples_seen is None else f"checkpoint at {samples_seen:,} samples"
        return "stopped", f"not heard of for a minute; {kept}: the same command resumes it"
    return "running", progress_line(progress)
