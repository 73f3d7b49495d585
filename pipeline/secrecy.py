"""Finds what looks like a secret in settings: a config is kept in records, batch scripts, W&B runs and model cards."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRET_NAME = re.compile(
    r"KEY(?!RING|WORD|BOARD)|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|SIGNATURE", re.IGNORECASE
)
"""The names of variables that are likely to hold a secret."""

# The value of each of these begins after it. One that begins with $ is a reference, which a shell takes from the
# environment.
_GIVEN = r"""["']?(?![$"'\s]|\Z)"""
_ASSIGNED = re.compile(rf"(?<![\w-])-?(?P<name>[A-Za-z_]\w*)={_GIVEN}")
_OPTION = re.compile(
    r"(?<![\w-])(?P<name>--?[a-z-]*(?:password|passwd|passphrase|secret|token|api-?key|access-?key))"
    rf"[ =]{_GIVEN}(?![-/~.])",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"\b(?P<name>authorization|cookie|\w+-(?:[\w-]+-)?(?:token|key|secret))\s*:\s*"
    rf"(?:(?:bearer|basic|token)\s+{_GIVEN}|(?!bearer|basic|token){_GIVEN})",
    re.IGNORECASE,
)
_LOGIN = re.compile(rf"(?<![\w-])(?P<name>-u|--user|--proxy-user)[ =]?{_GIVEN}[^\s:]+:{_GIVEN}")
_USER = re.compile(r"\b(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/\s@?#:]*)(?P<password>:[^/\s@?#]*)?@", re.IGNORECASE)
# Secrets of S3 hold slashes, and neither buckets nor ports put a colon there: a secret may run on to any @.
_OBJECT_LOGIN = re.compile(r"\bs3://(?!arn:)[^/\s@?#:]*:\S*@", re.IGNORECASE)
_QUERY = re.compile(rf"[?&](?P<name>[^=&\s#]+)={_GIVEN}")
_PARAMETER = re.compile(r"^(?:sig|auth|.*access_?id)$", re.IGNORECASE)
_LOGIN_SCHEMES = ("scp", "sftp", "ssh")
_PIPE = "pipe:"

_BY_JOBS = "give it by the environment, which the jobs inherit"
_BY_SHELL = "give it by the environment, as $NAME, which the pipe's shell fills in"
_BY_TOOL = "give it by the environment (HF_TOKEN, or as $NAME in a pipe: command) or by the tool's own login"


def find_secret(value: Any, path: str = "") -> str | None:
    """What of a config would be written down and should not be, in one line with the remedy; never the secret itself.

    Commands, that is `launch` and `pipe:` shards, are searched for NAME=value, options, headers and logins; every
    string for URLs with a user, a password or a signature.
    """
    for key, text in _texts(value, path):
        is_launch, is_pipe = key.split(".")[0] == "launch", text.startswith(_PIPE)
        name = _in_command(text) if is_launch or is_pipe else None
        if name is None and is_pipe and (match := _LOGIN.search(text)):
            name = match["name"]
        if name is not None:
            return f"{key} would write the value of {name} into the run's records; {_BY_SHELL if is_pipe else _BY_JOBS}"
        part = _in_url(text)
        if part is not None:
            return f"{key} would write {part} into the run's records; {_BY_SHELL if is_pipe else _BY_TOOL}"
    return None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Dotted key and text of every string; a list of strings is one text, an environment's entry NAME=value."""
    match value:
        case str():
            yield path, value
        case Mapping():
            for key, each in value.items():
                below = f"{path}.{key}" if path else str(key)
                is_variable = path.endswith(".environment") and isinstance(each, str)
                yield from _texts(f"{key}={each}" if is_variable else each, below)
        case list() | tuple() if all(isinstance(each, str) and not each.startswith(_PIPE) for each in value):
            yield path, " ".join(value)
        case list() | tuple():
            for each in value:
                yield from _texts(each, path)
        case _:
            pass


def _in_command(text: str) -> str | None:
    assigned = (match["name"] for match in _ASSIGNED.finditer(text) if SECRET_NAME.search(match["name"]))
    others = (match["name"] for pattern in (_OPTION, _HEADER) if (match := pattern.search(text)))
    return next(assigned, None) or next(others, None)


def _in_url(text: str) -> str | None:
    users = _USER.finditer(text)
    has_login = any(each["password"] or each["scheme"].lower() not in _LOGIN_SCHEMES for each in users)
    if has_login or _OBJECT_LOGIN.search(text):
        return "the login of a URL"
    if "://" in text:
        for match in _QUERY.finditer(text):
            if SECRET_NAME.search(match["name"]) or _PARAMETER.match(match["name"]):
                return f"a URL's {match['name']}"
    return None
