"""What a stage's result depends on, as one SHA-256."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import ADDED_LATER, RUNTIME, Settings


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def counted_settings(settings: Settings) -> dict[str, Any]:
    """The settings that change the result, as JSON values, at any depth.

    Fields marked `RUNTIME` are left out, and those marked `ADDED_LATER` that have their default.
    """
    counted: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if RUNTIME in field.metadata or (ADDED_LATER in field.metadata and value == field.default):
            continue
        counted[name] = counted_settings(value) if isinstance(value, Settings) else dumped[name]
    return counted


def fingerprint(identity: Mapping[str, Any], inputs: Mapping[str, list[str]]) -> str:
    """SHA-256 (hex) of a stage's identity and the fingerprints of its inputs."""
    return hashlib.sha256(canonical_json({"identity": identity, "inputs": inputs}).encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) for every leaf in which two nested mappings differ."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        here = f"{path}.{key}" if path else key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, here)
        elif old != new:
            yield here, old, new
