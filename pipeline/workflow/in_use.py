"""What commands at work have planned with, so that nobody who frees space takes it from them.

A command that starts runs records them and says what they need in one go, and whoever removes something looks and moves
it away in one go: the two have a lock. What a plan found finished is still there when its run begins, or is planned
anew, and from then on it is kept.
"""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter

from pipeline.config import Settings
from pipeline.errors import UserError, is_disk_full
from pipeline.workflow.artifacts import MANIFEST
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.ownership import Owner, StageLost, acquire, at_work, process_here
from pipeline.workflow.plan import Action, Plan, plan_run
from pipeline.workflow.runs import record_run
from pipeline.workflow.sealed import DamagedRecordError, read_record, write_json_atomically

COMMANDS = "commands"
_LOCK = "lock"
_NEEDS = "needs.json"
_LEASE_S = 60.0


class Needs(Settings):
    """What a command has planned with: its runs, their stages and what these read, and its code."""

    runs: list[str]
    stages: list[StageKey]
    code: list[str]


_RECORD = TypeAdapter(Needs)


@contextmanager
def recorded(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """Record these runs, and keep what they need in use meanwhile.

    Gives the plans; one whose finished stage was removed since it was made is made anew.
    """
    with ExitStack() as stack:
        made: dict[str, Plan] = {}
        for outputs in dict.fromkeys(plan.store.outputs for plan in plans):
            of_store = [plan for plan in plans if plan.store.outputs == outputs]
            made |= {plan.config.run.name: plan for plan in stack.enter_context(_recorded_in(outputs, of_store))}
        yield [made[plan.config.run.name] for plan in plans]


@contextmanager
def _recorded_in(outputs: Path, plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    with ExitStack() as stack:
        with store_lock(outputs):
            made = [plan if _stands(plan) else plan_run(plan.config, plan.overrides) for plan in plans]
            stack.enter_context(in_use(outputs, _needs_of(made)))
            for code in {plan.code.digest: plan.code for plan in made}.values():
                code.keep(outputs)
            for plan in made:
                record_run(plan, is_flushed=len(made) == 1)
            if len(made) > 1:
                os.sync()  # a thousand records in one go
        yield made


def _needs_of(plans: Sequence[Plan]) -> Needs:
    frozen = [stage.frozen for plan in plans for stage in plan.stages if stage.frozen is not None]
    stages = dict.fromkeys(key for each in frozen for key in ((each.stage, each.fingerprint), *each.reads))
    return Needs(
        runs=[plan.config.run.name for plan in plans],
        stages=list(stages),
        code=sorted({plan.code.digest for plan in plans}),
    )


@contextmanager
def in_use(outputs: Path, needs: Needs) -> Iterator[None]:
    """Have nobody take what a command needs. To be begun with the lock."""
    place = outputs / COMMANDS / uuid4().hex
    place.mkdir()
    owner = acquire(place, _LEASE_S, threading.Event())
    try:
        write_json_atomically(place / _NEEDS, needs.model_dump(mode="json"))
        yield
    finally:
        owner.release()
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def store_lock(outputs: Path) -> Iterator[Owner]:
    """Wait until no other process records runs in this store, or moves something away from it."""
    place = outputs / COMMANDS / _LOCK
    try:
        place.mkdir(parents=True, exist_ok=True)
        owner = acquire(place, _LEASE_S, threading.Event())
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{place} cannot be written ({error.strerror}); ask whose store it is") from error
    try:
        yield owner
    except StageLost as lost:
        raise UserError(f"{outputs} did not answer for {_LEASE_S:.0f} s, and others went on; run it again") from lost
    finally:
        owner.release()
        owner.forget_earlier()


@dataclass(frozen=True)
class CommandAtWork:
    """A command that is at work now: what it has planned with, who that is in words, and its process if it is here."""

    needs: Needs
    who: str
    process: int | None


def commands_at_work(outputs: Path) -> list[CommandAtWork]:
    """The commands that are at work in this store now."""
    found = []
    for path in outputs.glob(f"{COMMANDS}/*/{_NEEDS}"):
        who = at_work(path.parent)
        if who is not None:
            try:
                found.append(CommandAtWork(read_record(_RECORD, path), who, process_here(path.parent)))
            except FileNotFoundError:
                continue  # it has ended meanwhile
            except DamagedRecordError as error:
                raise UserError(f"{error}; wait until the command that wrote it has ended") from error
    return found


def forget_ended_commands(outputs: Path) -> None:
    """Remove what is left of commands that were killed. To be called with the lock."""
    for place in (outputs / COMMANDS).glob("*"):
        if place.name != _LOCK and not at_work(place):
            shutil.rmtree(place, ignore_errors=True)


def _stands(plan: Plan) -> bool:
    """Whether all that a plan found finished is still there, and what its stages are to start from."""
    finished = [(each.name, each.fingerprint) for each in plan.stages if each.action is Action.REUSE]
    initial = [each.frozen.initial for each in plan.stages if each.frozen is not None]
    keys = [*finished, *((each.stage, each.fingerprint) for each in initial if each is not None)]
    return all((plan.store.path(name, fingerprint or "") / MANIFEST).exists() for name, fingerprint in keys)
