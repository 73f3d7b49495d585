"""Runs the stages of plans side by side: each once, after its inputs, as soon as there is room for it."""

import errno
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from pipeline.config import OnDamage
from pipeline.errors import is_disk_full
from pipeline.launch.identity import this_process
from pipeline.launch.launcher import StageOutcome
from pipeline.launch.local.devices import Devices, Share
from pipeline.launch.local.worker import Worker
from pipeline.terminal.display import Display
from pipeline.workflow.causes import Cause, oom_kills, starts_again
from pipeline.workflow.frozen import FrozenStage, StageKey, frozen_path, halve_micro_batch, write_frozen
from pipeline.workflow.notify import tell_of_failure
from pipeline.workflow.ownership import Pulse, StageLost, Vacancy
from pipeline.workflow.plan import Action, Plan, PlannedStage
from pipeline.workflow.progress import Failure, Outcome, read_failure, read_progress, write_failure

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """A stage that is to be settled, for the first run that needs it."""

    run: str
    title: str
    stage: PlannedStage
    frozen: FrozenStage
    vacancy: Vacancy

    @property
    def key(self) -> StageKey:
        """What it makes."""
        return self.frozen.stage, self.frozen.fingerprint


@dataclass(frozen=True)
class Running:
    """A stage that a worker is at."""

    task: Task
    worker: Worker
    share: Share
    started: float
    oom_kills: int
    pulse: Pulse


class Schedule:
    """Settles every stage of some plans. Descendants of a failure are skipped, and all else goes on.

    Ctrl-C, SIGTERM and SIGUSR1 have the stages that run checkpoint and stop; a second Ctrl-C or SIGTERM kills them.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        devices: Devices,
        display: Display,
        retries: Mapping[Cause, int] | None = None,
        first: Collection[str] = (),
    ) -> None:
        """`retries` is how often a stage starts again after a failure, by its cause.

        Stages named in `first` start before others that could.
        """
        self._retries = retries or {}
        self._causes: dict[StageKey, list[Cause]] = {}
        self._devices = devices
        self._display = display
        self._outcomes: dict[StageKey, StageOutcome] = {}
        self._pending: list[Task] = []
        self._running: list[Running] = []
        self._first = first
        self._idle: dict[tuple[tuple[str, ...], int], list[Worker]] = {}
        self._waiting: set[StageKey] = set()
        self._is_stopping = False
        self._tasks: dict[StageKey, Task] = {}
        self._made_anew: set[StageKey] = set()
        self._met_one_anew: set[StageKey] = set()
        self._rebuilds = all(plan.config.store.on_damage is OnDamage.REBUILD for plan in plans)
        for plan in plans:
            self._take_in(plan, is_sweep=len(plans) > 1)

    def run(self) -> list[StageOutcome]:
        """Settle all of them, or what can be until a signal asks to stop."""
        try:
            with self._signals():
                while self._running or (self._pending and not self._is_stopping):
                    self._start_what_can()
                    self._collect()
                    time.sleep(POLL_SECONDS)
        finally:
            self._close()
        ended = list(self._outcomes.values())
        if self._is_stopping and self._pending and all(each.outcome is not Outcome.INTERRUPTED for each in ended):
            # The signal came while nothing ran; what would have been next tells of it.
            first = self._pending[0]
            ended.append(StageOutcome(first.run, *first.key, Outcome.INTERRUPTED))
        return ended

    def _take_in(self, plan: Plan, is_sweep: bool) -> None:
        run = plan.config.run.name
        self._display.start_run(plan)
        known = {task.key: task for task in self._pending}
        for number, stage in enumerate(plan.stages, 1):
            frozen = stage.frozen
            assert frozen is not None, "a plan with blocked stages is not run"
            title = f"{f'{run} ' if is_sweep else ''}[{number}/{len(plan.stages)}] {stage.name}"
            task = Task(run, title, stage, frozen, Vacancy(frozen.work, frozen.trainer.lease_s, this_process().job))
            if task.key in known or task.key in self._outcomes:
                first = known[task.key].run if task.key in known else self._outcomes[task.key].run
                self._display.share(title, first)
                continue
            self._tasks[task.key] = task
            if stage.action is Action.REUSE:
                self._display.reuse(title, stage)
                self._settle(task, Outcome.REUSED)
            else:
                self._pending.append(task)

    def _start_what_can(self) -> None:
        for task in sorted(self._pending, key=lambda task: task.frozen.stage not in self._first):
            if self._is_stopping:
                return
            ended = [self._outcomes[key] for key in task.frozen.needs if key in self._outcomes]
            lost = [each.stage for each in ended if each.outcome in (Outcome.FAILED, Outcome.SKIPPED)]
            if lost:
                self._pending.remove(task)
                self._display.skip(task.title, lost)
                self._settle(task, Outcome.SKIPPED)
            # Room first: whether a stage is free is asked of the disk.
            elif self._devices.has_room and len(ended) == len(task.frozen.needs) and self._is_free(task):
                share = self._devices.take(task.frozen)
                if share is not None:
                    self._pending.remove(task)
                    self._start(task, share)

    def _is_free(self, task: Task) -> bool:
        """Whether no other command has the stage. Where one has, this one waits, and keeps no place for it."""
        is_free = True
        with suppress(StageLost):  # the stage's own process finds that again, and says it
            is_free = task.vacancy.is_free
        if not is_free and task.key not in self._waiting:
            self._waiting.add(task.key)
            self._display.wait(task.title)
        return is_free

    def _start(self, task: Task, share: Share) -> None:
        self._display.start(task.title, task.stage)
        try:
            file = write_frozen(task.frozen)
        except OSError as error:
            if is_disk_full(error):
                raise
            self._devices.give_back(share)
            self._fail(task, _of_its_folder(task.frozen, error))
            return
        self._close_others_on(share)
        idle = self._idle.get((share.gpus, share.width))
        worker = idle.pop() if idle else Worker(self._devices.environment(share, os.environ))
        worker.begin(file)
        self._running.append(Running(task, worker, share, time.monotonic(), oom_kills(), Pulse(task.frozen.work)))

    def _fail(self, task: Task, failure: Failure) -> None:
        """It could not even start, and nothing can be kept of it."""
        self._display.finish(task.title, task.stage, 0.0, Outcome.FAILED, failure)
        self._settle(task, Outcome.FAILED, failure=failure)
        tell_of_failure(task.frozen, failure)

    def _close_others_on(self, share: Share) -> None:
        """End what is idle and holds memory of these GPUs."""
        for (gpus, _), workers in self._idle.items():
            if gpus != share.gpus and set(gpus) & set(share.gpus):
                while workers:
                    workers.pop().close()

    def _close(self) -> None:
        for each in self._running:  # there is one only where something went wrong here
            each.worker.interrupt()
        for worker in chain((each.worker for each in self._running), *self._idle.values()):
            worker.close()

    def _collect(self) -> None:
        for each in list(self._running):
            outcome = each.worker.outcome()
            if outcome is None:
                self._display.update(each.task.title, read_progress(each.task.frozen.work))
                self._end_if_silent(each)
                continue
            self._running.remove(each)
            self._devices.give_back(each.share)
            self._idle.setdefault((each.share.gpus, each.share.width), []).append(each.worker)
            duration_s = time.monotonic() - each.started
            failure = _failure(each) if outcome is Outcome.FAILED else None
            self._is_stopping |= outcome is Outcome.INTERRUPTED
            if failure is not None and (again := self._again(each.task, failure.cause)) is not None:
                self._display.again(each.task.title, failure, again)
                self._pending.insert(0, each.task)
                continue
            if failure is not None and self._starts_again_on_other_inputs(each.task):
                self._display.again(each.task.title, failure, "once its inputs are made anew")
                continue
            self._display.finish(each.task.title, each.task.stage, duration_s, outcome, failure)
            self._settle(each.task, outcome, duration_s, failure)
            if failure is not None:
                tell_of_failure(each.task.frozen, failure)

    def _end_if_silent(self, running: Running) -> None:
        """End a worker that cannot even say that it hangs: its process is stopped, or something holds all of it."""
        trainer, pulse = running.task.frozen.trainer, running.pulse
        if trainer.hang_after_s is None or not pulse.is_lost(max(trainer.hang_after_s, trainer.lease_s)):
            return
        message = (
            f"stage {running.task.frozen.stage}: nothing was heard of its process for {pulse.silent_s():.0f} s, and it "
            "was ended; run again to go on from the last checkpoint, or raise trainer.hang_after_s"
        )
        _keep(running.task.frozen.work, Failure(message, True, Cause.COLLECTIVE))
        running.worker.kill()

    def _starts_again_on_other_inputs(self, task: Task) -> bool:
        """Whether it failed as inputs were found damaged: they are made anew, once, and it is to start again.

        So is one that failed, once, as another had found the damage.
        """
        anew = self._made_anew.intersection(task.frozen.needs)
        if anew and (task.key not in self._met_one_anew or not anew <= self._outcomes.keys()):
            self._met_one_anew.add(task.key)
            self._pending.append(task)
            return True
        damaged = [self._tasks[key] for key in task.frozen.needs if task.frozen.store.known_damage(*key) is not None]
        if not self._rebuilds or not damaged or any(each.key in self._made_anew for each in damaged):
            return False
        for each in damaged:
            self._made_anew.add(each.key)
            self._outcomes.pop(each.key, None)
            stage = replace(each.stage, action=Action.RUN, reason="anew, as it was found damaged")
            self._pending.append(replace(each, stage=stage))
        self._met_one_anew.add(task.key)
        self._pending.append(task)
        return True

    def _again(self, task: Task, cause: Cause) -> str | None:
        """How a stage that failed is started once more, in words; None where it is not."""
        earlier = self._causes.setdefault(task.key, [])
        count = starts_again(self._retries, cause, earlier)
        if count is None or self._is_stopping:
            return None
        earlier.append(cause)
        if cause not in (Cause.OUT_OF_MEMORY, Cause.OUT_OF_DEVICE_MEMORY):
            return count
        half = halve_micro_batch(frozen_path(task.frozen))
        return None if half is None else f"{count}, with trainer.micro_batch_size={half}"

    def _settle(self, task: Task, outcome: Outcome, duration_s: float = 0.0, failure: Failure | None = None) -> None:
        self._outcomes[task.key] = StageOutcome(task.run, *task.key, outcome, duration_s, failure)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, lambda number, _: self._stop(number)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._display.note("stopping at the next step boundary, with a checkpoint; Ctrl-C again to stop at once")
            for each in self._running:
                each.worker.interrupt()
        elif number != signal.SIGUSR1:
            for each in self._running:
                each.worker.kill()


def _failure(ended: Running) -> Failure:
    """What the stage has said of its failure, or what can be seen of it."""
    work = ended.task.frozen.work
    known = read_failure(work)
    if known is not None:
        return known
    status = ended.worker.status
    how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
    found = Failure(f"its process ended {how} and without a word; see the log", False, Cause.UNKNOWN)
    if status == -signal.SIGKILL and oom_kills() > ended.oom_kills:
        found = Failure("the machine ran out of memory and ended its process", True, Cause.OUT_OF_MEMORY)
    _keep(work, found)
    return found


def _of_its_folder(frozen: FrozenStage, error: OSError) -> Failure:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give this user the right to it, or set paths.outputs, and run again"
        return Failure(f"stage {frozen.stage}: {error}; {remedy}", True, Cause.PERMISSION)
    return Failure(f"stage {frozen.stage}: {error}; move away what is in the way, and run again", True, Cause.SETTINGS)


def _keep(work: Path, failure: Failure) -> None:
    with suppress(OSError):  # a full disk: it is said here
        write_failure(work, failure)
