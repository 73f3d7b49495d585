"""One progress display for a whole workflow; plain lines where there is no terminal."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.workflow.plan import Action, Plan, PlannedStage
from pipeline.workflow.progress import LOG, Failure, Progress

SECONDS_BETWEEN_PLAIN_LINES = 10.0


def format_duration(seconds: float) -> str:
    """`8 s`, `2:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_line(progress: Progress) -> str:
    """What is known of a stage in progress, in one line."""
    if progress.max_samples <= 0:
        return progress.activity or progress.phase.value
    parts = [f"{progress.samples_seen:,} / {progress.max_samples:,} samples"]
    if progress.samples_per_s > 0:
        parts.append(f"{progress.samples_per_s:,.0f} samples/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.time_left_s is not None and progress.phase.value == "working":
        parts.append(f"{format_duration(progress.time_left_s)} left")
    if progress.activity:
        parts.append(progress.activity)
    return " · ".join(parts)


class Display:
    """Shows stage k of n with its progress: a live line on a terminal, else a plain line every ten seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._prefix = ""
        self._started = 0.0
        self._last_plain = 0.0
        self._number = 0
        self._total = 0

    def start_run(self, plan: Plan) -> None:
        """A workflow begins."""
        self._number = 0
        self._total = len(plan.stages)
        to_do = sum(stage.action is not Action.REUSE for stage in plan.stages)
        self.note(f"run {plan.config.run.name}: {to_do} of {self._total} stages to do")

    def reuse(self, stage: PlannedStage) -> None:
        """A stage is finished already."""
        self._number += 1
        self.note(f"{self._position(stage)}  reused, {stage.reason}")

    def share(self, stage: PlannedStage, run: str) -> None:
        """A stage was settled for another run of the same sweep."""
        self._number += 1
        self.note(f"{self._position(stage)}  shared with run {run}")

    def skip(self, stage: PlannedStage, lost: Sequence[str]) -> None:
        """A stage cannot run since an input failed."""
        self._number += 1
        self.note(f"{self._position(stage)}  skipped: {', '.join(lost)} did not finish")

    def start(self, stage: PlannedStage, work: Path) -> None:
        """A stage begins."""
        self._number += 1
        self._prefix = self._position(stage)
        self._started = self._last_plain = time.monotonic()
        what = "resumes" if stage.action is Action.RESUME else "runs"
        self.note(f"{self._prefix}  {what} ({stage.reason})")
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, progress: Progress | None) -> None:
        """Show how far the stage is."""
        line = progress_line(progress) if progress else "starting"
        elapsed = format_duration(time.monotonic() - self._started)
        text = f"{self._prefix}  {line} · {elapsed}"
        if self._live is not None:
            share = 0.0
            if progress and progress.max_samples:
                share = min(1.0, progress.samples_seen / progress.max_samples)
            filled = round(30 * share)
            bar = Text.assemble(("━" * filled, "green"), ("━" * (30 - filled), "dim"), " ", text)
            self._live.update(bar)
        elif time.monotonic() - self._last_plain >= SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain = time.monotonic()
            self.note(text)

    def finish(self, stage: PlannedStage, duration_s: float, interrupted: bool, failure: Failure | None) -> None:
        """A stage ended."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if interrupted:
            self.note(f"{self._prefix}  stopped; the same command resumes it")
            return
        if failure is None:
            self.note(f"{self._prefix}  done in {format_duration(duration_s)}")
            return
        self.note(f"{self._prefix}  FAILED: {failure.message}")
        if not failure.is_user_error and stage.frozen is not None:
            self.note(f"      log: {stage.frozen.work / LOG}")

    def note(self, line: str) -> None:
        """A line of its own."""
        self._console.print(line, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Show a table."""
        self._console.print(table)

    def _position(self, stage: PlannedStage) -> str:
        return f"[{self._number}/{self._total}] {stage.name}"
