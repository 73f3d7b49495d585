"""The rows that a stage logs, one JSON object a line: in its work directory, and beside its artifact."""

from collections.abc import Mapping

METRICS = "metrics.jsonl"
PICTURES = "pictures.jsonl"
"""In the work directory: the pictures that a stage logged, each with `samples_seen`, `name`, `file` and `captions`."""
AXIS = "samples_seen"
MEASURED = "system/"
"""The prefix of what was measured of the machine. All else in a row is the same on every run of the same stage."""


def without_measured(row: Mapping[str, float]) -> dict[str, float]:
    """The part of a row that a disturbed and an undisturbed run have in common, bit for bit."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}
