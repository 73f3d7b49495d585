"""What commands at work have planned with, so that nobody who frees space takes it from them.

A command that starts runs records them and says what they need in one go, and whoever removes something looks and moves
it away in one go: the two have a lock. What a plan found finished is still there when its run begins, or is planned
anew, and from then on it is kept.
"""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from pipeline.config import Settings
from pipeline.errors import UserError, is_disk_full
from pipeline.workflow.artifacts import MANIFEST, write_json_atomically
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.ownership import Owner, StageLost, acquire, at_work
from pipeline.workflow.plan import Action, Plan, plan_run
from pipeline.workflow.runs import record_run

COMMANDS = "commands"
_LOCK = "lock"
_NEEDS = "needs.json"
_LEASE_S = 60.0


class Needs(Settings):
    """What a command has planned with: its runs, and their stages, finished or not."""

    runs: list[str]
    stages: list[StageKey]


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
    place = outputs / COMMANDS / uuid4().hex
    with store_lock(outputs):
        made = [plan if _stands(plan) else plan_run(plan.config, plan.overrides) for plan in plans]
        stages = {(stage.name, stage.fingerprint): None for plan in made for stage in plan.stages if stage.fingerprint}
        place.mkdir()
        owner = acquire(place, _LEASE_S, threading.Event())
        needs = Needs(runs=[plan.config.run.name for plan in made], stages=list(stages))
        write_json_atomically(place / _NEEDS, needs.model_dump(mode="json"))
        for plan in made:
            record_run(plan)
    try:
        yield made
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


def commands_at_work(outputs: Path) -> list[Needs]:
    """What the commands that are at work here now have planned with."""
    found = []
    for path in outputs.glob(f"{COMMANDS}/*/{_NEEDS}"):
        if at_work(path.parent):
            try:
                values = json.loads(path.read_bytes())
                found.append(Needs.model_validate({name: values[name] for name in Needs.model_fields}))
            except FileNotFoundError:
                continue  # it has ended meanwhile
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} cannot be read; wait until the command that wrote it has ended") from error
    return found


def forget_ended_commands(outputs: Path) -> None:
    """Remove what is left of commands that were killed. To be called with the lock."""
    for place in (outputs / COMMANDS).glob("*"):
        if place.name != _LOCK and not at_work(place):
            shutil.rmtree(place, ignore_errors=True)


def _stands(plan: Plan) -> bool:
    """Whether all that a plan found finished is still there."""
    return all(
        (plan.store.path(stage.name, stage.fingerprint) / MANIFEST).exists()
        for stage in plan.stages
        if stage.action is Action.REUSE and stage.fingerprint is not None
    )
