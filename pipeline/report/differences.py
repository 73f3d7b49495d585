"""What differs between the configs of runs, and between the overrides of a sweep's members."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.workflow.runs import RunRecord

ABSENT = "—"
_IDENTITY = ("run.name", "run.group")
_OVERRIDE = re.compile(r"^(?P<key>[+~]*[^=]+)=(?P<value>.*)$", re.DOTALL)


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Dotted key -> its value in each run, for the keys that differ; a run's name and group are no settings.

    Values are as JSON writes them, strings bare; `ABSENT` where a run has no such key.
    """
    flat = [dict(_flattened(record.config)) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values if key not in _IDENTITY)
    found = {key: [values.get(key, ABSENT) for values in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def differing_overrides(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Key of an override -> its value in each run, for those that not all runs have alike; a run's name is none."""
    parsed = [dict(_split(override) for override in record.overrides) for record in records]
    keys = dict.fromkeys(key for values in parsed for key in values if key not in _IDENTITY)
    found = {key: [values.get(key, ABSENT) for values in parsed] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _split(override: str) -> tuple[str, str]:
    match = _OVERRIDE.match(override)
    return (match["key"], match["value"]) if match else (override, "yes")


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{path}.")
        else:
            yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
