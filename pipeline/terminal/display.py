"""One progress display for a whole workflow; plain lines where there is no terminal."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.terminal.tables import new_console, result_table
from pipeline.terminal.words import format_duration, progress_line
from pipeline.workflow.causes import Cause
from pipeline.workflow.plan import Action, Plan, PlannedStage
from pipeline.workflow.progress import LOG, Failure, Outcome, Progress
from pipeline.workflow.runs import PICTURES, RunRecord, gather_pictures, run_directory

SECONDS_BETWEEN_PLAIN_LINES = 10.0


def shown_path(path: Path) -> str:
    """The path as a person would write it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass
class _Row:
    """What is shown of a stage that runs. Times are seconds on the monotonic clock."""

    started: float
    last_plain: float
    bar: Text


class Display:
    """Shows how stages come along: on a terminal a live line for each that runs, else a plain line every ten seconds.

    A stage is told from others by its title, `[3/10] decoder`, in front of which a sweep has the member's name.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or new_console()
        self._live: Live | None = None
        self._rows: dict[str, _Row] = {}

    def start_run(self, plan: Plan) -> None:
        """A workflow begins."""
        to_do = sum(stage.action is not Action.REUSE for stage in plan.stages)
        self.note(f"run {plan.config.run.name}: {to_do} of {len(plan.stages)} stages to do")

    def reuse(self, title: str, stage: PlannedStage) -> None:
        """A stage is finished already."""
        self.note(f"{title}  reused, {stage.reason}")

    def share(self, title: str, run: str) -> None:
        """A stage is settled for another run of the same sweep."""
        self.note(f"{title}  shared with run {run}")

    def skip(self, title: str, lost: Sequence[str]) -> None:
        """A stage cannot run since an input failed."""
        self.note(f"{title}  skipped: {', '.join(lost)} did not finish")

    def wait(self, title: str) -> None:
        """A stage is another command's at the moment."""
        self.note(f"{title}  waits: another command works on it")

    def start(self, title: str, stage: PlannedStage) -> None:
        """A stage begins."""
        now = time.monotonic()
        what = "resumes" if stage.action is Action.RESUME else "runs"
        self.note(f"{title}  {what} ({stage.reason})")
        self._rows[title] = _Row(now, now, Text(title))
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, title: str, progress: Progress | None) -> None:
        """Show how far a stage is."""
        row = self._rows[title]
        line = progress_line(progress) if progress else "starting"
        text = f"{title}  {line} · {format_duration(time.monotonic() - row.started)}"
        if self._live is not None:
            share = 0.0
            if progress and progress.max_samples:
                share = min(1.0, progress.samples_seen / progress.max_samples)
            filled = round(30 * share)
            row.bar = Text.assemble(("━" * filled, "green"), ("━" * (30 - filled), "dim"), " ", text)
            self._live.update(Group(*(each.bar for each in self._rows.values())))
        elif time.monotonic() - row.last_plain >= SECONDS_BETWEEN_PLAIN_LINES:
            row.last_plain = time.monotonic()
            self.note(text)

    def again(self, title: str, failure: Failure, how: str) -> None:
        """A stage failed, and is started once more."""
        self.note(f"{title}  {failure.cause.words}: {failure.message}; starts again ({how})")

    def finish(
        self, title: str, stage: PlannedStage, duration_s: float, outcome: Outcome, failure: Failure | None = None
    ) -> None:
        """A stage ended."""
        del self._rows[title]
        if self._live is not None and not self._rows:
            self._live.stop()
            self._live = None
        if outcome is Outcome.INTERRUPTED:
            self.note(f"{title}  stopped; the same command resumes it")
        elif failure is None:
            self.note(f"{title}  done in {format_duration(duration_s)}")
        else:
            known = "" if failure.cause in (Cause.SETTINGS, Cause.UNKNOWN) else f" ({failure.cause.words})"
            self.note(f"{title}  FAILED{known}: {failure.message}")
            if not failure.is_user_error and stage.frozen is not None:
                self.note(f"      log: {stage.frozen.work / LOG}")

    def result(self, outputs: Path, record: RunRecord) -> None:
        """What a run has made."""
        self.show(result_table(outputs, record))
        pictures = gather_pictures(outputs, record)
        directory = run_directory(outputs, record.name)
        self.note(f"run:      {shown_path(directory)}")
        if pictures:
            self.note(f"pictures: {shown_path(directory / PICTURES)}")

    def note(self, line: str) -> None:
        """A line of its own."""
        self._console.print(line, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Show a table."""
        self._console.print(table)
