"""The rows of a `metrics.jsonl`, all of them or, of a long file, so many as a report can read in time."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.workflow.record import MEASURED, PICTURE, RESUMES, entries, standing, whole_lines
from pipeline.workflow.sealed import NO_FILE, content_of

ELAPSED = f"{MEASURED}elapsed_s"
VALIDATION = "validation/"
_HEAD_BYTES = 1 << 18
_ALWAYS_READ = tuple(f'"{name}'.encode() for name in (VALIDATION, RESUMES))


@dataclass(frozen=True)
class SampledRows:
    """Rows in their order. `is_whole`: none of the file's was left out."""

    rows: tuple[dict[str, Any], ...]
    is_whole: bool


def sampled_rows(path: Path, limit: int) -> SampledRows:
    """About `limit` rows, spread evenly over the file, and as many of its validations; a short file whole.

    Rows are found by their place in the file, so that the others are neither split off nor parsed. The first row and
    the last are always there. A line that a kill cut short is left out, as are what is no row and the rows that a
    resume superseded; no file has no rows.
    """
    content = _content(path)
    if not _is_long(content, limit):
        return SampledRows(_parsed(path, content.splitlines()), is_whole=True)
    size = len(content)
    ends = [content.rfind(b"\n", 0, size - 1) + 1]
    starts = {_line_start(content, number * size // limit) for number in range(limit)}
    validations, resumes = (list(_marked_lines(content, mark)) for mark in _ALWAYS_READ)
    every = -(-len(validations) // limit) or 1
    chosen = sorted({*starts, *ends, *validations[::every], *validations[-1:], *resumes})
    return SampledRows(_parsed(path, (_line(content, start) for start in chosen)), is_whole=False)


def elapsed(row: Mapping[str, Any], before: float | None) -> float | None:
    """The seconds of training at a row; those of the rows before where it has none."""
    value = row.get(ELAPSED)
    return value if is_finite_number(value) else before


def is_finite_number(value: object) -> bool:
    """Whether it can be drawn: no text, no truth value, not nan, not infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _content(path: Path) -> bytes:
    """Its whole lines."""
    try:
        content = content_of(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError) and error.errno not in NO_FILE:
            raise
        return b""  # of what is in the place of a file the artifact's damage tells
    return content[: whole_lines(content)]


def _is_long(content: bytes, limit: int) -> bool:
    """Whether it has more lines than `limit`; where it has many times as many, its beginning tells."""
    head = content[:_HEAD_BYTES]
    about = head.count(b"\n") * len(content) // max(1, len(head))
    return about > 2 * limit or content.count(b"\n") > limit


def _marked_lines(content: bytes, mark: bytes) -> Iterator[int]:
    """Where each line begins that holds the mark."""
    at = content.find(mark)
    while at >= 0:
        yield _line_start(content, at)
        end = content.find(b"\n", at)
        at = -1 if end < 0 else content.find(mark, end)


def _line_start(content: bytes, at: int) -> int:
    return content.rfind(b"\n", 0, at) + 1


def _line(content: bytes, start: int) -> bytes:
    end = content.find(b"\n", start)
    return content[start:] if end < 0 else content[start:end]


def _parsed(path: Path, lines: Iterable[bytes]) -> tuple[dict[str, Any], ...]:
    return tuple(row for row in standing(entries(lines, path)) if PICTURE not in row)
