"""What the board shows: the report of all runs, and where their unfinished stages stand."""

import hashlib
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from rich.table import Table

from pipeline.errors import UserError
from pipeline.launch.launcher import state_tables
from pipeline.report.page import Live, page
from pipeline.report.records import read_comparison
from pipeline.report.select import select_runs
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.progress import FAILURE
from pipeline.workflow.record import METRICS
from pipeline.workflow.runs import RECORD, RunRecord, is_finished

SECONDS_FRESH = 4.0
"""How long an answer stands, whoever asks: a queue's controller has others to serve."""


@dataclass(frozen=True)
class ShownTable:
    """A table as text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Now:
    """`html` of what runs and waits, and a `version` that is another one once the rest of the page is."""

    html: Markup
    version: str


class Content:
    """Reads the store anew for each question, and makes the page again only where something has changed."""

    def __init__(self, outputs: Path, runs: Sequence[str]) -> None:
        """`runs` as `unclip compare` takes them; none of them for all there are."""
        self._outputs = outputs
        self._runs = tuple(runs) or ("*",)
        self._lock = threading.RLock()
        self._now: tuple[float, Now] | None = None
        self._page: tuple[str, str] | None = None

    def now(self) -> Now:
        """What runs and waits, some seconds old at most. Raises `UserError` where there is no run."""
        with self._lock:
            if self._now is None or time.monotonic() - self._now[0] > SECONDS_FRESH:
                self._now = time.monotonic(), self._look()
            return self._now[1]

    def _look(self) -> Now:
        selection = select_runs(self._outputs, self._runs)
        unfinished = [each for each in selection.records if not is_finished(self._outputs, each)]
        tables, notes = state_tables(self._outputs, unfinished, "in progress") if unfinished else ([], [])
        lines = [*notes, *(f"left out: {each}" for each in selection.unreadable)]
        html = _template().render(tables=list(map(_shown, tables)), notes=lines)
        return Now(Markup(html), self._version(selection.records))

    def page(self) -> str:
        """The whole page. Raises `UserError` where there is no run."""
        with self._lock:
            now = self.now()
            if self._page is None or self._page[0] != now.version:
                comparison = read_comparison(self._outputs, select_runs(self._outputs, self._runs).records)
                script = (files("pipeline.board") / "live.js").read_text(encoding="utf-8")
                self._page = now.version, page(comparison, live=Live(now.html, now.version, script))
            return self._page[1]

    def _version(self, records: Iterable[RunRecord]) -> str:
        """Of everything that the report is made from but progress, which changes all the time."""
        store = ArtifactStore(self._outputs)
        digest = hashlib.sha256()
        watched = {self._outputs / "runs" / record.name / RECORD for record in records}
        for stage in (stage for record in records for stage in record.stages):
            key = stage.name, stage.fingerprint
            watched |= {store.work(*key) / METRICS, store.work(*key) / FAILURE}
            with suppress(OSError):  # there is none yet
                watched |= set(store.path(*key).rglob("*"))
        for path in sorted(watched):
            try:
                found = path.stat()
            except OSError:
                continue
            digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:16]


def page_without_runs(error: UserError) -> str:
    """What is served until there is something to show; it looks again by itself."""
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
        f"<title>unclip board</title><p>{Markup.escape(str(error))}</p></html>"
    )


def _shown(table: Table) -> ShownTable:
    columns = [tuple(map(str, column.cells)) for column in table.columns]
    heads = tuple(str(column.header) for column in table.columns)
    return ShownTable(str(table.title or ""), heads, tuple(zip(*columns, strict=True)))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pipeline", "board"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("now.html.jinja")
