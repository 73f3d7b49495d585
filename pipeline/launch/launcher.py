"""What a launcher is. `launch.kind` names its module in this package, which holds it as `LAUNCHER`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from pipeline.config import RunConfig, Settings, validate
from pipeline.errors import UserError
from pipeline.launch.identity import ProcessIdentity, identity_here
from pipeline.terminal.display import Display
from pipeline.terminal.tables import status_table
from pipeline.workflow.declaration import modules_in
from pipeline.workflow.plan import Plan
from pipeline.workflow.progress import Failure, Outcome
from pipeline.workflow.runs import RunRecord, stage_log


class LaunchSettings(Settings):
    """What the settings of every launcher have."""

    kind: str


class LauncherUnavailableError(UserError):
    """What the launcher starts stages by is not here, or does not answer."""


@dataclass(frozen=True)
class StageOutcome:
    """A stage, how it ended, how long that took here (seconds), and why it failed."""

    run: str
    stage: str
    fingerprint: str
    outcome: Outcome
    duration_s: float = 0.0
    failure: Failure | None = None


class Launcher(ABC):
    """Starts the stages of planned runs, and knows afterwards what became of them.

    `settings` is the schema of `launch`. One that `waits` stays until its stages have ended: it is for `unclip run`.
    The others leave them to something that outlives the command: they are for `unclip submit`.
    """

    settings: type[LaunchSettings]
    waits: bool

    def check(self, plans: Sequence[Plan]) -> None:
        """Raise `UserError` where this launcher cannot run what is planned. Writes nothing."""
        return

    def preview(self, plans: Sequence[Plan]) -> Iterable[RenderableType]:
        """What `unclip plan` shows of what would be started; a text as it is."""
        return ()

    @abstractmethod
    def submit(self, plans: Sequence[Plan], display: Display) -> list[StageOutcome]:
        """Start every stage that is not finished, each one once, and after its inputs.

        A stage is started by `python -m pipeline.training.worker FROZEN`. Gives the outcomes of those that were waited
        for.
        """

    def state(self, outputs: Path, records: Sequence[RunRecord], title: str) -> Table | None:
        """Where the stages of these runs stand; None where this launcher has none of them.

        Raises `LauncherUnavailableError` where that cannot be asked.
        """
        return None

    def cancel(self, outputs: Path, records: Sequence[RunRecord]) -> list[str]:
        """Stop the stages of these runs that no other run counts on, and say so in lines."""
        return []

    def at_work(self, outputs: Path, works: Sequence[Path]) -> dict[Path, str]:
        """Of these work directories those that something outside of this machine's files works at or will, in words.

        Where that cannot be asked: those of which it is not known.
        """
        return {}

    def log(self, outputs: Path, record: RunRecord, stage: str) -> Path:
        """Where the output of a stage is. Raises `UserError` where there is none."""
        return stage_log(outputs, record, stage)

    def identity(self, environment: Mapping[str, str]) -> ProcessIdentity:
        """Which of a stage's processes the one with this environment is."""
        return identity_here(environment)


def launchers() -> dict[str, Launcher]:
    """Every launcher by its kind."""
    modules = modules_in("pipeline.launch")
    return {name: module.LAUNCHER for name, module in modules.items() if hasattr(module, "LAUNCHER")}


def state_tables(outputs: Path, records: Sequence[RunRecord], title: str) -> tuple[list[Table], list[str]]:
    """Where the stages of these runs stand, as queues have them, else from files; and lines on what is lacking."""
    tables, notes = [], []
    for launcher in launchers().values():
        try:
            table = launcher.state(outputs, records, title)
        except LauncherUnavailableError as error:
            notes.append(f"from files alone, as {error}")
        else:
            tables += [] if table is None else [table]
    own_title = title if len(records) > 1 else f"run {records[0].name}"
    return tables or [status_table(outputs, records, own_title)], notes


def launcher_named(kind: object) -> Launcher:
    """The launcher of that kind. Raises `UserError` that lists those there are."""
    known = launchers()
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"launch.kind={kind!r} is no choice; there are {', '.join(map(repr, known))}")
    return known[kind]


def launcher_of(config: RunConfig) -> Launcher:
    """The launcher of a config, whose settings are valid. Raises `UserError` otherwise."""
    launcher = launcher_named(config.launch.get("kind"))
    validate(launcher.settings, config.launch, "launch")
    return launcher
