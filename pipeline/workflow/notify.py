"""Tells a program or a web address of a failure, and of the end of a run or sweep; at worst it prints a line."""

import hashlib
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Sequence
from enum import StrEnum
from http.client import HTTPException
from urllib.error import HTTPError

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
            _run(settings.command, message)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"notify.command was not told of this: {error}", flush=True)
    if settings.webhook is not None:
        try:
            address = _address(settings.webhook)
            request = urllib.request.Request(address, message.encode(), {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except (OSError, ValueError, UserError, HTTPException) as error:
            print(f"notify.webhook was not told of this: {_without_address(error)}", flush=True)


def require_address(settings: NotifySettings | None) -> None:
    """Raise `UserError` where the webhook is a variable that is not set, or holds no address."""
    if settings is not None and settings.webhook is not None:
        _address(settings.webhook)


def _address(webhook: str) -> str:
    address = os.environ.get(webhook[1:], "") if webhook.startswith("$") else webhook
    if not address.startswith(("https://", "http://")):
        raise UserError(
            f"notify.webhook={webhook}: the variable holds no https:// address here; export it, or set null"
        )
    return address


def _without_address(error: Exception) -> str:
    """What went wrong, without the address, which may be a secret."""
    if isinstance(error, HTTPError):
        return f"it answered with status {error.code}"
    if isinstance(error, TimeoutError):
        return f"it did not answer for {_TIMEOUT_S:.0f} s"
    return str(error) if isinstance(error, UserError) else type(error).__name__


def _run(command: Sequence[str], message: str) -> None:
    """Without a shell. Where it takes too long, what it has started ends with it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            process.communicate(message, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"it took more than {_TIMEOUT_S:.0f} s, and was ended") from error
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def tell_of_failure(frozen: FrozenStage, failure: Failure) -> None:
    """A stage failed, and does not start again."""
    text = f"stage {frozen.stage} of {frozen.run} failed, {failure.cause.words}: {failure.message}"
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
