"""What a shell does to overrides: a key that is given twice is refused, and brace patterns are kept whole."""

import re
import shlex
from collections.abc import Iterator, Sequence

import braceexpand

from pipeline.errors import UserError

_BRACES = re.compile(r"(?<!\$)\{[^{}:=\s]*(,|\.\.)[^{}:=\s]*\}")
_QUOTES = "'\""
_QUOTED_KEY = re.compile(r"""(["'])([^"']+)\1(?=\s*:)""")
_SPECIAL = re.compile(r"[\\()\[\]{}:=, \t]")  # what a backslash makes a part of a key
_PATH = re.compile(r"/|\.[A-Za-z]\w*\W*$")  # what braces are written for: a path, a URL, or the name of a file
_SHOWN = 4


def key_of(argument: str) -> str | None:
    """The config key or group that an override concerns, without its prefix; None for what is no override."""
    bare = argument.lstrip("+~")
    if argument.startswith("-") or ("=" not in bare and not argument.startswith("~")):
        return None
    return bare.partition("=")[0].strip()


def refuse_repeated_keys(arguments: Sequence[str]) -> None:
    """Raise `UserError` where a key is given more than once: Hydra would take the last one, and not say so."""
    for key, repeated in _repeated(arguments):
        whole = _before_the_shell(arguments, repeated)
        if whole is not None:
            times = _times(repeated)
            raise UserError(f"{key} is given {times}, as the shell spelled out the braces; quote it: {whole}")
        raise UserError(_given(key, repeated, f"give it once{_as_a_sweep(repeated)}"))


def refuse_repeated_keys_of_member(fixed: Sequence[str], point: Sequence[str], place: str) -> None:
    """The same for the overrides of a sweep's member in a line of a file, alone and beside the command line's."""
    both = [*fixed, *point]
    for arguments, remedy in ((point, "give it once"), (both, "give it on the command line or in the file")):
        for key, repeated in _repeated(arguments):
            raise UserError(f"{place}: {_given(key, repeated, remedy)}")


def with_quoted_braces(override: str) -> str:
    """The override with quotes around each of its values (of a sweep, of a list) that holds a brace pattern.

    Only for what Hydra cannot read as it is: its grammar keeps braces for mappings.
    """
    key, equals, value = override.partition("=")
    return f"{key}{equals}{''.join(map(_quoted, _values(value)))}"


def with_plain_keys(override: str) -> str:
    """The override of a mapping with its quoted keys as Hydra's grammar takes them, which knows no quotes there."""
    return _QUOTED_KEY.sub(lambda match: _SPECIAL.sub(r"\\\g<0>", match[2]), override)


def brace_pattern(values: Sequence[str]) -> str | None:
    """The shortest pattern of braces that a shell spells out as these values, in their order; None without one."""
    sizes = [size for size in range(2, len(values) // 2 + 1) if len(values) % size == 0]
    parts = ([_one_brace(values[at : at + size]) for at in range(0, len(values), size)] for size in sizes)
    candidates = [_one_brace(values), *map(_one_brace, parts)]
    return next((each for each in sorted(candidates, key=len) if _expanded(each) == list(values)), None)


def _repeated(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    by_key: dict[str, list[str]] = {}
    for argument in arguments:
        if (key := key_of(argument)) is not None:
            by_key.setdefault(key, []).append(argument)
    return ((key, given) for key, given in by_key.items() if len(given) > 1)


def _given(key: str, repeated: Sequence[str], remedy: str) -> str:
    shown = [*repeated[: _SHOWN - 1], "...", repeated[-1]] if len(repeated) > _SHOWN else repeated
    return f"{key} is given {_times(repeated)} ({', '.join(shown)}); {remedy}"


def _times(repeated: Sequence[str]) -> str:
    return "twice" if len(repeated) == 2 else f"{len(repeated)} times"


def _before_the_shell(arguments: Sequence[str], repeated: list[str]) -> str | None:
    """The one override that a shell made these of, quoted; None where they do not look as if it had."""
    place = list(arguments).index(repeated[0])
    if list(arguments[place : place + len(repeated)]) != repeated:
        return None
    heads, _, values = zip(*(each.partition("=") for each in repeated), strict=True)
    if len(set(heads)) > 1 or len(set(values)) < len(values) or not all(map(_PATH.search, values)):
        return None
    pattern = brace_pattern(values)
    if pattern is None or re.fullmatch(r"\{[^{}]*\}", pattern):
        return None
    return shlex.quote(f"{heads[0]}={pattern}")


def _as_a_sweep(repeated: Sequence[str]) -> str:
    heads, _, values = zip(*(each.partition("=") for each in repeated), strict=True)
    if heads[0].startswith("~") or len(set(heads)) > 1 or len(set(values)) < len(values) or "(" in "".join(values):
        return ""
    swept = f"{heads[0]}={','.join(values)}"
    return f", or sweep over its values: -m {shlex.quote(swept)}"


def _one_brace(values: Sequence[str]) -> str:
    """The values with one pair of braces around what differs, which no number is cut by."""
    before = _shared_start(values).rstrip("0123456789")
    rest = [value.removeprefix(before) for value in values]
    after = _shared_start([each[::-1] for each in rest])[::-1].lstrip("0123456789")
    middles = [each.removesuffix(after) for each in rest]
    return f"{before}{{{_range(middles) or ','.join(middles)}}}{after}"


def _shared_start(values: Sequence[str]) -> str:
    least, greatest = min(values), max(values)
    differ = (place for place, (one, other) in enumerate(zip(least, greatest, strict=False)) if one != other)
    return least[: next(differ, len(least))]


def _range(middles: Sequence[str]) -> str | None:
    if not all(each.isdecimal() for each in middles):
        return None
    first, second, last = middles[0], middles[1], middles[-1]
    for candidate in (f"{first}..{last}", f"{first}..{last}..{abs(int(second) - int(first))}"):
        if _expanded(f"{{{candidate}}}") == list(middles):
            return candidate
    return None


def _expanded(pattern: str) -> list[str] | None:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        return None


def _quoted(value: str) -> str:
    bare = value.strip()
    is_mapping = bare.startswith("{") and bare.endswith("}") and ":" in bare
    if is_mapping or not _BRACES.search(bare) or any(each in bare for each in f"{_QUOTES}\\"):
        return value
    return value.replace(bare, f"'{bare}'")


def _values(text: str) -> Iterator[str]:
    """The single values in the text of an override, and what stands between them: `[ ] ( ) ,` outside of braces."""
    value, depth, quote = "", 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
        elif letter in "[]()," and depth <= 0:
            yield value
            yield letter
            value = ""
            continue
        value += letter
    yield value
