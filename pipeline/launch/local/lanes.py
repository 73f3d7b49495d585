"""Runs plans on this machine: stages one after the other in a warm worker process, so that imports are paid once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.terminal.display import Display
from pipeline.workflow.frozen import FrozenFile, StageKey, write_frozen
from pipeline.workflow.plan import Action, Plan, PlannedStage
from pipeline.workflow.progress import EXIT_INTERRUPTED, LOG, Failure, Outcome, read_failure, read_progress, result_path

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StageOutcome:
    """A stage, how it ended, how long that took here (seconds), and why it failed."""

    run: str
    stage: str
    fingerprint: str
    outcome: Outcome
    duration_s: float = 0.0
    failure: Failure | None = None


def run_plans(plans: Iterable[Plan], display: Display) -> list[StageOutcome]:
    """Run every stage that has to, each once however many plans share it; descendants of a failure are skipped."""
    outcomes: dict[StageKey, StageOutcome] = {}
    worker = Worker()
    try:
        for plan in plans:
            display.start_run(plan)
            for stage in plan.stages:
                outcome = _settle(stage, plan.config.run.name, outcomes, worker, display)
                if outcome.outcome is Outcome.INTERRUPTED:
                    return list(outcomes.values())
    finally:
        worker.close()
    return list(outcomes.values())


def _settle(
    stage: PlannedStage, run: str, outcomes: dict[StageKey, StageOutcome], worker: "Worker", display: Display
) -> StageOutcome:
    assert stage.frozen is not None, "a plan with blocked stages is not run"
    key = (stage.name, stage.frozen.fingerprint)
    if key in outcomes:
        display.share(stage, outcomes[key].run)
        return outcomes[key]
    lost = [
        name
        for references in stage.frozen.inputs.values()
        for name, fingerprint in ((each.stage, each.fingerprint) for each in references)
        if outcomes[name, fingerprint].outcome in (Outcome.FAILED, Outcome.SKIPPED)
    ]
    duration_s = 0.0
    failure = None
    if stage.action is Action.REUSE:
        outcome = Outcome.REUSED
        display.reuse(stage)
    elif lost:
        outcome = Outcome.SKIPPED
        display.skip(stage, lost)
    else:
        frozen = write_frozen(stage.frozen)
        started = time.monotonic()
        display.start(stage, frozen.stage.work)
        outcome = worker.run(frozen, display)
        duration_s = time.monotonic() - started
        failure = _failure(frozen) if outcome is Outcome.FAILED else None
        display.finish(stage, duration_s, outcome is Outcome.INTERRUPTED, failure)
    outcomes[key] = StageOutcome(run, stage.name, key[1], outcome, duration_s, failure)
    return outcomes[key]


def _failure(frozen: FrozenFile) -> Failure:
    unexplained = Failure("its process ended without a word (killed, or out of memory?)", is_user_error=False)
    return read_failure(frozen.stage.work) or unexplained


class Worker:
    """A process that runs frozen stages. It is started with the first one and serves all stages of one device."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._interrupts = 0

    def run(self, frozen: FrozenFile, display: Display) -> Outcome:
        """Run one stage to its end, showing its progress. Ctrl-C or SIGTERM asks it to checkpoint; a second kills."""
        process = self._start(frozen)
        previous = {
            number: signal.signal(number, lambda *_: self._interrupt(process, display))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return self._wait(process, frozen, display)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _start(self, frozen: FrozenFile) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.training.worker"]
        frozen.stage.work.mkdir(parents=True, exist_ok=True)
        # The processes of a stage that trains on several devices start each other, from the command of the first.
        if frozen.stage.tasks.total > 1:
            return self._spawn([*command, str(frozen.path)], frozen)
        if self._process is None or self._process.poll() is not None:
            self._process = self._spawn(command, frozen)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"frozen": str(frozen.path)}) + "\n")
        self._process.stdin.flush()
        return self._process

    def _spawn(self, command: list[str], frozen: FrozenFile) -> subprocess.Popen[str]:
        log = frozen.stage.work / LOG
        with log.open("a") as output:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, start_new_session=True
            )

    def _interrupt(self, process: subprocess.Popen[str], display: Display) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            display.note("stopping at the next step boundary, with a checkpoint; Ctrl-C again to stop at once")
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    def _outcome_of(self, exit_status: int) -> Outcome:
        if exit_status == 0:
            return Outcome.FINISHED
        return Outcome.INTERRUPTED if self._interrupts or exit_status == EXIT_INTERRUPTED else Outcome.FAILED

    def _wait(self, process: subprocess.Popen[str], frozen: FrozenFile, display: Display) -> Outcome:
        result = result_path(frozen.path, process.pid)
        while True:
            ended = process.poll() is not None
            if result.exists():
                outcome = Outcome(result.read_text())
                result.unlink()
                return outcome
            if ended:
                return self._outcome_of(process.returncode)
            display.update(read_progress(frozen.stage.work))
            time.sleep(POLL_SECONDS)
