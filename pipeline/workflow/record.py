"""A stage's one record: `metrics.jsonl` in its work directory, one JSON object a line, in the order of what happened.

Lines are appended, flushed to disk and never changed. A damaged one is left out. There are three kinds:

- a row: `samples_seen`, and metrics by name;
- a picture: `samples_seen`, `picture` (its name), `file` (below the work directory) and `captions`;
- a resume: `resumes_at`. Lines before it with a higher `samples_seen` are superseded, as training logs them again.

The file of that name beside an artifact has the rows that stand, and nothing else.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import INTEGER_LIMIT
from pipeline.workflow.sealed import content_of, lines_of, read_line, sealed_line, warn_of_damaged_lines

METRICS = "metrics.jsonl"
AXIS = "samples_seen"
PICTURE = "picture"
RESUMES = "resumes_at"
MEASURED = "system/"
"""The prefix of what was measured of the machine. All else in a row is the same on every run of the same stage."""

Entry = dict[str, Any]
EntryKey = tuple[int, frozenset[str]]
"""What tells an entry from the others: `samples_seen`, and the names of what does not change when it is repeated."""


def without_measured(row: Mapping[str, float]) -> dict[str, float]:
    """The part of a row that a disturbed and an undisturbed run have in common, bit for bit."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def append(work: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to the record of that work directory; it is on disk when this returns."""
    with (work / METRICS).open("ab") as file:
        file.write(sealed_line(entry))
        file.flush()
        os.fsync(file.fileno())


def resume(work: Path, samples_seen: int) -> None:
    """Go on at a checkpoint: cut off a line that a kill tore, and supersede what is past `samples_seen`."""
    path = work / METRICS
    if not path.exists():
        return
    content = content_of(path)
    end = whole_lines(content)
    if end < len(content):
        os.truncate(path, end)
    if any(entry[AXIS] > samples_seen for entry in standing(entries(content[:end].splitlines(), path))):
        append(work, {RESUMES: samples_seen})


def size_of_rows(work: Path) -> int:
    """How many bytes the record of that work directory has."""
    path = work / METRICS
    return path.stat().st_size if path.exists() else 0


def whole_lines(content: bytes) -> int:
    """How many bytes of it are whole lines."""
    return content.rfind(b"\n") + 1


def entries(lines: Iterable[bytes], path: Path) -> Iterator[Entry]:
    """The entries of whole lines of a file, superseded ones and resumes too; damaged ones are left out, and said."""
    return (entry for entry in _entries(lines, path) if entry is not None)


def _entries(lines: Iterable[bytes], path: Path) -> Iterator[Entry | None]:
    """The same, with None for a damaged line."""
    damaged = 0
    for line in lines:
        entry = _entry_of(line)
        damaged += entry is None
        yield entry
    warn_of_damaged_lines(path, damaged)


def _entry_of(line: bytes) -> Entry | None:
    """None for what is no entry, or not as it was written."""
    entry = read_line(line)
    return entry if entry is not None and _is_entry(entry) else None


def _is_entry(entry: Entry) -> bool:
    if RESUMES in entry:
        return _is_count(entry[RESUMES])
    if not _is_count(entry.get(AXIS)):
        return False
    if PICTURE in entry:
        captions = entry.get("captions")
        return isinstance(captions, list) and all(
            isinstance(each, str) for each in (entry[PICTURE], entry.get("file"), *captions)
        )
    return all(each is None or isinstance(each, float) or _is_count(each, -INTEGER_LIMIT) for each in entry.values())


def _is_count(value: object, least: int = -1) -> bool:
    return isinstance(value, int) and least <= value < INTEGER_LIMIT


def standing(found: Iterable[Entry]) -> list[Entry]:
    """Rows and pictures without those that a later resume superseded."""
    kept: list[Entry] = []
    for entry in found:
        if RESUMES in entry:
            kept = [each for each in kept if each[AXIS] <= entry[RESUMES]]
        else:
            kept.append(entry)
    return kept


def read_standing(work: Path) -> list[Entry]:
    """The rows and pictures that stand in the record of that work directory; none without a record."""
    path = work / METRICS
    content = lines_of(path)
    return standing(entries(content[: whole_lines(content)].splitlines(), path))


def write_rows(work: Path, directory: Path) -> None:
    """Put the rows that stand beside an artifact, as its `metrics.jsonl`; nothing where there is no record."""
    if (work / METRICS).exists():
        rows = [entry for entry in read_standing(work) if PICTURE not in entry]
        (directory / METRICS).write_bytes(b"".join(map(sealed_line, rows)))


class Replay:
    """The entries as W&B is to have them, however often the stage was resumed: each once, where it came first.

    The step of an entry is its place among them, which in an undisturbed record is the number of its line, from 0. It
    never changes, as the record only grows.
    """

    def __init__(self, work: Path) -> None:
        self._path = work / METRICS
        self._read = 0
        self._seen: set[EntryKey] = set()

    @property
    def count(self) -> int:
        """How many entries there were so far."""
        return len(self._seen)

    def new(self) -> Iterator[tuple[int, Entry]]:
        """Steps and entries that were added since the last call."""
        content = lines_of(self._path, self._read)
        end = whole_lines(content)
        self._read += end
        for entry in _entries(content[:end].splitlines(), self._path):
            if entry is None:  # it keeps its step: it may have been sent when it was whole
                self._seen.add((len(self._seen), frozenset()))
                continue
            if RESUMES in entry:
                continue
            key = _key_of(entry)
            if key not in self._seen:
                self._seen.add(key)
                yield len(self._seen) - 1, entry


def _key_of(entry: Entry) -> EntryKey:
    names = [entry[PICTURE], PICTURE] if PICTURE in entry else without_measured(entry)
    return entry[AXIS], frozenset(names)
