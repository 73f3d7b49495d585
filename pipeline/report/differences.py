"""What differs between the configs of runs, and between the overrides of a sweep's members."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.workflow.runs import RunRecord

ABSENT = "—"
_IDENTITY = ("run.name", "run.group")
_OVERRIDE = re.compile(r"^\+{0,2}(?P<key>[^=+]+)=(?P<value>.*)$", re.DOTALL)


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Dotted key -> its value in each run, for the keys that differ; a run's name and group are no settings.

    Values are as JSON writes them, strings bare where that leaves no two alike; `ABSENT` where a run has no such key.
    """
    forms = [dict(_flattened(record.config)) for record in records]
    return _differing(forms, dict.fromkeys(key for values in forms for key in values))


def differing_overrides(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Key of an override -> its value in each run, for those that not all runs have alike; a run's name is none.

    Where the key is a setting, its values are those of the configs: a run whose line leaves it out has one too.
    """
    lines = [dict(_split(override) for override in record.overrides) for record in records]
    keys = dict.fromkeys(key for line in lines for key in line)
    # Looked up one by one: a config has hundreds of settings and a sweep varies a few.
    found = [{key: value for key in keys if (value := _setting(record.config, key)) is not None} for record in records]
    settings = {key for values in found for key in values}
    for values, line in zip(found, lines, strict=True):
        values |= {key: line[key] for key in keys if key in line and key not in settings}
    return _differing(found, keys)


def _differing(forms: Sequence[Mapping[str, str]], keys: Iterable[str]) -> dict[str, list[str]]:
    """Key -> what to show of each run, for the keys whose JSON is not the same in all."""
    found = {key: [values.get(key) for values in forms] for key in keys if key not in _IDENTITY}
    return {key: _shown(values) for key, values in found.items() if len(set(values)) > 1}


def _shown(values: Sequence[str | None]) -> list[str]:
    """Values without the quotes of strings, unless a string would then look like another run's number."""
    bare = [ABSENT if value is None else _bare(value) for value in values]
    if len(set(bare)) == len(set(values)):
        return bare
    return [ABSENT if value is None else value for value in values]


def _bare(value: str) -> str:
    parsed = json.loads(value)
    return parsed if isinstance(parsed, str) else value


def _setting(config: Mapping[str, Any], key: str) -> str | None:
    """The JSON of a setting; None where there is none, or a whole group of them."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return None if isinstance(value, Mapping) and value else json.dumps(value, ensure_ascii=False)


def _split(override: str) -> tuple[str, str]:
    """Key and value, as JSON text; `x`, `+x` and `++x` are one key."""
    match = _OVERRIDE.match(override)
    key, value = (match["key"], match["value"]) if match else (override, "yes")
    return key, json.dumps(value, ensure_ascii=False)


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and JSON of every setting."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{path}.")
        else:
            yield path, json.dumps(value, ensure_ascii=False)
