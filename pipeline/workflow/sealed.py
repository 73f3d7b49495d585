"""JSON records that processes read back, each with a digest of itself: what reads them never meets a changed one.

A record from before there were digests has none, and is read for what it holds.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from pipeline.errors import UserError

SEAL = "sha256"
"""The key of a record's digest, SHA-256 (hex) of its other values."""

T = TypeVar("T")


class DamagedRecordError(UserError):
    """A record on disk is not what was written."""


def write_json_atomically(path: Path, value: Mapping[str, Any], *, is_flushed: bool = True) -> None:
    """Write beside, flush to disk, rename: a reader sees the old record or the new one, never half of one.

    The directory must exist. What may be lost with the machine need not be flushed.
    """
    value = {key: each for key, each in value.items() if key != SEAL}
    # Of what a reader will have, to whom keys are texts.
    sealed = {**value, SEAL: digest_of(from_json(json.dumps(value)))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(to_json(sealed, indent=2))
        if is_flushed:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of what JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The values of a record. Raises `DamagedRecordError` for any other bytes, and `OSError` as reading does."""
    try:
        values = from_json(path.read_bytes())
    except ValueError as error:
        raise DamagedRecordError(f"{path} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise DamagedRecordError(f"{path} cannot be read (it holds no record)")
    seal = values.pop(SEAL, None)
    if seal is not None and seal != digest_of(values):
        raise DamagedRecordError(f"{path} cannot be read (its content does not match its own digest)")
    return values


def read_record(schema: TypeAdapter[T], path: Path) -> T:
    """A record, typed. Raises `DamagedRecordError` where the file holds anything else, and `OSError`."""
    values = read_json(path)
    try:
        return schema.validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DamagedRecordError(f"{path} cannot be read ({where}: {fault['msg']})") from error


def read_or_none(schema: TypeAdapter[T], path: Path, then: str) -> T | None:
    """A record, or None without one. Where it is damaged, a line says so and what is done `then`."""
    try:
        return read_record(schema, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedRecordError as error:
        warn(f"{error}; {then}")
        return None


@cache
def warn(line: str) -> None:
    """Say something to whoever reads the log or the terminal, once."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
