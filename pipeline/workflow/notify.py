"""Tells a program or a web address of a failure, and of the end of a run or sweep; at worst it prints a line."""

import hashlib
import json
import os
import subprocess
import urllib.request
from enum import StrEnum

from pipeline.config import NotifySettings
from pipeline.errors import UserError
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import Failure
from pipeline.workflow.runs import is_finished, read_runs, run_directory

_TIMEOUT_S = 20.0


class Event(StrEnum):
    """What there is to tell."""

    FAILURE = "failure"
    END = "end"


def tell(settings: NotifySettings | None, event: Event, run: str, text: str, **more: str) -> None:
    """Tell whoever is to know; a line on standard output where that does not work. `text` is one line for people."""
    if settings is None:
        return
    message = json.dumps({"event": event.value, "run": run, "text": f"unclip: {text}", **more})
    if settings.command is not None:
        try:
            subprocess.run(settings.command, input=message, text=True, timeout=_TIMEOUT_S, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"notify.command was not told of this: {error}", flush=True)
    if settings.webhook is not None:
        address = settings.webhook
        try:
            if address.startswith("$"):
                address = os.environ[address[1:]]
            if not address.startswith(("https://", "http://")):
                raise ValueError("it is no https:// address")
            request = urllib.request.Request(address, message.encode(), {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except (OSError, ValueError, KeyError) as error:  # without the address, which may be a secret
            print(f"notify.webhook was not told of this: {type(error).__name__}", flush=True)


def tell_of_failure(frozen: FrozenStage, failure: Failure) -> None:
    """A stage failed, and does not start again."""
    text = f"stage {frozen.stage} of {frozen.group} failed, {failure.cause.words}: {failure.message}"
    tell(frozen.notify, Event.FAILURE, frozen.run, text, stage=frozen.stage, cause=failure.cause.value)


def tell_of_end(frozen: FrozenStage) -> None:
    """Where this stage was the last one of its run or sweep to be finished, tell so, once."""
    if frozen.notify is None:
        return
    try:
        records = read_runs(frozen.outputs, frozen.group)
    except UserError:  # removed meanwhile
        return
    if not all(is_finished(frozen.outputs, record) for record in records):
        return
    made = sorted({stage.fingerprint for record in records for stage in record.stages})
    mark = hashlib.sha256("".join(made).encode()).hexdigest()[:12]
    try:
        (run_directory(frozen.outputs, records[0].name) / f".told-{mark}").touch(exist_ok=False)
    except OSError:  # the last two at the same moment: the other one tells
        return
    tell(frozen.notify, Event.END, frozen.group, f"every stage of {frozen.group} is finished")
