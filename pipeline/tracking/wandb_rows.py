"""Which rows W&B has of a stage, so that none is sent twice and none is lost.

A log on disk says what a start meant to send. Whether it arrived is known to the server alone, which says how many
rows it has when a run is opened: rows arrive in order, so those are the first that many of all that were sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.tracking.wandb_log import history
from pipeline.tracking.wandb_record import (
    RowKey,
    WandbRecord,
    fragments,
    is_offline,
    key_of,
    mark_of,
    not_uploaded,
)


@dataclass(frozen=True)
class Arrived:
    """The rows that the server has, or will have once the offline starts are uploaded.

    `unknown` more are there that no log has, because a kill took them from W&B's memory after they were sent: the first
    of the others.
    `untouched` is the start whose upload failed before its first row, if that is how it failed.
    """

    rows: frozenset[RowKey]
    unknown: int = 0
    untouched: Path | None = None


@dataclass(frozen=True)
class _Sent:
    """The rows of one start, and how many the server had before its first; None: whatever there were before."""

    log: Path
    begins_at: int | None
    rows: tuple[RowKey, ...]


def arrived(work: Path, record: WandbRecord, server_count: int, opened: str) -> Arrived:
    """What a server that says it has `server_count` rows has of this stage, for the start `opened`, which is new."""
    logs = [log for log in _uploaded_logs(work, record) if log.parent.name != opened]
    server: list[RowKey | None] = []
    untouched = None
    for sent in _sent(logs):
        begins_at = len(server) if sent.begins_at is None else sent.begins_at
        if _is_attempt(sent.log) and server_count <= begins_at:
            untouched = sent.log
            continue
        # What earlier starts meant to have there never arrived, or this one would not begin so early.
        server = [*server[:begins_at], *[None] * (begins_at - len(server)), *sent.rows]
    server = [*server[:server_count], *[None] * (server_count - len(server))]
    attempts = {log for log in logs if _is_attempt(log)} - {untouched}
    waiting = [log for log in not_uploaded(work) if log not in attempts]
    rows = {row for row in server if row is not None}
    return Arrived(frozenset(rows.union(*map(_keys, waiting))), server.count(None), untouched)


def kept_in_logs(work: Path, opened: str) -> Arrived:
    """What W&B has without asking the server: an offline start sends none of it, and `unclip sync` sees to the rest."""
    return Arrived(frozenset().union(*(_keys(log) for log in fragments(work) if log.parent.name != opened)))


def _sent(logs: list[Path]) -> Iterator[_Sent]:
    for log in logs:
        rows = list(history(log))
        if not rows:
            continue
        # `wandb sync` shifts the steps of a log behind those that are there.
        begins_at = None if is_offline(log) else int(rows[0]["_step"])
        yield _Sent(log, begins_at, tuple(key_of(row) for row in rows))


def _uploaded_logs(work: Path, record: WandbRecord) -> list[Path]:
    """In the order of uploading. Records of earlier versions name none of them: those came first, by their start."""
    logs = {log.parent.name: log for log in fragments(work)}
    unnamed = [
        log
        for name, log in logs.items()
        if name not in record.uploads and (not is_offline(log) or mark_of(log).exists())
    ]
    return [*unnamed, *(logs[name] for name in record.uploads if name in logs)]


def _is_attempt(log: Path) -> bool:
    """Whether an upload of that log began, given that it is among the uploads, and did not end well."""
    return is_offline(log) and not mark_of(log).exists()


def _keys(log: Path) -> set[RowKey]:
    return {key_of(row) for row in history(log)}
