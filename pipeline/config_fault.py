"""What is wrong with settings, in one line: the key as it is typed, the value, the rule and the remedy."""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError


def first_fault(error: ValidationError, values: Mapping[str, Any], path: str, schema: type[BaseModel]) -> str:
    """The first thing that `error` says of `values` under the key `path`, and how many more there are."""
    faults = error.errors()
    fault = faults[0]
    location = [str(part) for part in fault["loc"]]
    key = ".".join([*([path] if path else []), *_existing(location, values, fault["type"])])
    more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        valid = _fields_beside(location, schema)
        known = f"valid keys here: {', '.join(sorted(valid))}" if valid else "see the valid ones with --cfg job"
        return f"{key} is an unknown key; {known}{more}"
    if fault["type"] == "union_tag_invalid":
        context = fault.get("ctx", {})
        kind = f"{key}.{str(context.get('discriminator')).strip(chr(39))}={context.get('tag')!r}"
        return f"{kind} is no choice; there are {context.get('expected_tags')}{more}"
    if fault["type"] == "value_error":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}{more}".removeprefix(": ")
    if fault["type"] == "missing":
        return f"{key} is missing and has no default; set it on the command line{more}"
    return f"{key}={fault['input']!r}: {fault['msg']}; {_remedy(fault['type'], fault['input'])}{more}"


def _remedy(kind: str, value: object) -> str:
    """What to write instead: the whole number itself where it was written as a float or a text."""
    if kind == "int_type" and isinstance(value, float | str) and re.fullmatch(r"\d{1,18}(\.0)?", str(value)):
        return f"write {str(value).removesuffix('.0')}"
    return "give a value that fits"


def _fields_beside(location: list[str], schema: type[BaseModel]) -> list[str]:
    """The keys that are valid where the location's last part is not; empty where that cannot be told."""
    current: Any = schema
    for part in location[:-1]:
        choices = [each for each in get_args(current) if part in _literals_of(each)]
        if choices:
            current = choices[0]
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return []
        current = field.annotation
    is_settings = isinstance(current, type) and issubclass(current, BaseModel)
    return list(current.model_fields) if is_settings else []


def _literals_of(schema: Any) -> list[Any]:
    """The values of a choice's fields that can have one value alone, such as its kind."""
    fields = schema.model_fields.values() if isinstance(schema, type) and issubclass(schema, BaseModel) else ()
    return [
        value for field in fields if get_origin(field.annotation) is Literal for value in get_args(field.annotation)
    ]


def _existing(location: list[str], values: Any, kind: str) -> list[str]:
    """Drop the parts of pydantic's location that are no keys (the tags of a union)."""
    kept = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(values, Mapping) and part not in values and not (is_last and kind == "missing"):
            continue
        kept.append(part)
        values = values.get(part) if isinstance(values, Mapping) else None
    return kept
