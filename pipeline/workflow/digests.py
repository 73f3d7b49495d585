"""Files by size and SHA-256, and whether they still are what they were. What was verified is remembered per host."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.config import Settings
from pipeline.errors import UserError
from pipeline.workflow.sealed import opened, read_or_none, write_json_atomically

_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class FileRecord(Settings):
    """A file of an artifact: POSIX path inside it, bytes, SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


Marks = dict[str, list[str | int]]
"""Path of a file -> its digest when it was verified, and what would change with its content."""


class Verified(Settings):
    """What a host remembers of an artifact."""

    files: Marks


_VERIFIED = TypeAdapter(Verified)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's contents."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(files: Sequence[Path]) -> list[str]:
    """SHA-256 (hex) of files, read side by side: hashing holds no lock of Python's."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_sha256, files))


def describe_files(directory: Path) -> list[FileRecord]:
    """Every file below `directory` with its size and digest, sorted by path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [
        FileRecord(path=file.relative_to(directory).as_posix(), size=file.stat().st_size, sha256=digest)
        for file, digest in zip(files, sha256_of(files), strict=True)
    ]


def size_fault(directory: Path, records: Sequence[FileRecord]) -> str | None:
    """What is wrong with the first file that is missing or has another size; None without one. Reads no file."""
    for record in records:
        path = directory / record.path
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        except OSError as error:
            raise _unreadable(error) from error
        if size != record.size:
            return f"{path} has {size:,} bytes and had {record.size:,}"
    return None


def fault(directory: Path, records: Sequence[FileRecord], memory: Path | None = None) -> str | None:
    """What is wrong with the first file that is not what its record says; None where all are.

    With a directory `memory`, a file that this host has verified and nobody has touched since is not read again.

    Raises:
        UserError: a file is there and cannot be read.
    """
    found = size_fault(directory, records)
    if found is not None or (memory is not None and _unverified(directory, records, _marks_in(memory)) == []):
        return found
    with _alone(memory):
        marks = {} if memory is None else _marks_in(memory)  # another process may have been at it
        unverified = _unverified(directory, records, marks)
        try:
            now = {record.path: _mark(directory, record) for record in unverified}
            digests = sha256_of([directory / record.path for record in unverified])
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except OSError as error:
            raise _unreadable(error) from error
        for record, digest in zip(unverified, digests, strict=True):
            if digest != record.sha256:
                return f"{directory / record.path} does not have the digest in its manifest"
        if memory is not None:
            with suppress(OSError):  # a store of others', or a full disk: it is verified again next time
                write_json_atomically(_of_this_host(memory), {"files": {**marks, **now}}, is_flushed=False)
    return None


def _unverified(directory: Path, records: Sequence[FileRecord], marks: Marks) -> list[FileRecord]:
    try:
        return [record for record in records if marks.get(record.path) != _mark(directory, record)]
    except OSError:
        return list(records)


def _mark(directory: Path, record: FileRecord) -> list[str | int]:
    status = (directory / record.path).stat()
    return [record.sha256, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _of_this_host(memory: Path) -> Path:
    return memory / f"{socket.gethostname()}.json"


def _marks_in(memory: Path) -> Marks:
    verified = read_or_none(_VERIFIED, _of_this_host(memory), "the files are verified again")
    return {} if verified is None else verified.files


@contextmanager
def _alone(memory: Path | None) -> Iterator[None]:
    """Wait until no other process of this host verifies the same, where locks can be had."""
    with ExitStack() as stack:
        if memory is not None:
            with suppress(OSError):
                memory.mkdir(parents=True, exist_ok=True)
                path = _of_this_host(memory).with_suffix(".lock")
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)  # which waits for no pipe either
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror}); see to its file system, and run again")
