"""JSON records that processes read back, each with a digest of itself: what reads them never meets a changed one.

Files that grow have a record a line, which ends with its CRC-32. A record from before there were digests has none, and
is read for what it holds.
"""

import errno
import hashlib
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from pipeline.errors import UserError

SEAL = "sha256"
"""The key of a record's digest, SHA-256 (hex) of its other values."""

NO_FILE = {
    errno.EISDIR: "it is a directory", errno.ELOOP: "it is a link to itself", errno.ENXIO: "it is a pipe or a device",
}  # fmt: skip
"""What is in the place of a file that cannot be read, by the error that says so."""

_CHECKED = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')

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
    try:
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # what is in the way, not what was to come


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of what JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def opened(path: Path) -> BufferedReader:
    """A file to read. Raises `OSError` for a directory, and for a pipe or a device, which one could wait for."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    kind = os.fstat(file).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(file, "rb")
    os.close(file)
    error = errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO
    raise OSError(error, NO_FILE[error], str(path))


def content_of(path: Path) -> bytes:
    """All of a file. Raises `OSError` as `opened` does."""
    with opened(path) as file:
        return file.read()


def lines_of(path: Path, start: int = 0) -> bytes:
    """A file that grows, from that byte on; nothing where there is none, or where it is no file, which a line says."""
    try:
        with opened(path) as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        warn(f"{path} cannot be read ({NO_FILE[error.errno]}); what it said is left out")
        return b""


def read_json(path: Path) -> dict[str, Any]:
    """The values of a record. Raises `DamagedRecordError` for anything else there, and `OSError` as reading does."""
    try:
        values = from_json(content_of(path))
    except ValueError as error:
        raise DamagedRecordError(f"{path} cannot be read ({error})") from error
    except OSError as error:
        said = NO_FILE.get(error.errno or 0)
        if said is None:
            raise
        raise DamagedRecordError(f"{path} cannot be read ({said})") from error
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


def sealed_line(value: Mapping[str, Any]) -> bytes:
    """A record as a line of a file."""
    text = json.dumps(value).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def read_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None for what is no record, or not as it was written."""
    checked = _CHECKED.search(line)
    if checked is not None:
        line = line[: checked.start()] + b"}"
        if zlib.crc32(line) != int(checked[1], 16):
            return None
    try:
        values = from_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def warn_of_damaged_lines(path: Path, damaged: int) -> None:
    """Say how many lines of a file were left out, if any were."""
    if damaged:
        warn(f"{path}: {damaged} line{' is' if damaged == 1 else 's are'} damaged and left out")


@cache
def warn(line: str) -> None:
    """Say something to whoever reads the log or the terminal, once."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
