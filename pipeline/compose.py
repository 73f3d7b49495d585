"""The one door to Hydra: from a command line to validated configs, with every fault a `UserError` of one line."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import MissingMandatoryValue

from pipeline.compose_fault import errors_of_one_line, refusals_of_options
from pipeline.config import RunConfig, RunSettings, validate
from pipeline.errors import UserError
from pipeline.launch.launcher import launcher_of
from pipeline.overrides import (
    key_of,
    refuse_repeated_keys,
    refuse_repeated_keys_of_member,
    with_plain_keys,
    with_quoted_braces,
)
from pipeline.secrecy import find_secret

CONFIG_DIRECTORY = (Path(__file__).parent / "conf").resolve()
"""A link to the checkout's folder, whose files a wheel has in its place."""
_OF_ONE_STAGE = re.compile(r"(stage\.[^.=]+\.trainer|launch\.stages\.[^.=]+|launch\.environment)\.[^=]+=")
_MULTIRUN = ("-m", "--multirun")
_MEMBERS = "--members"


@dataclass(frozen=True)
class Member:
    """One composed config of a command line: the run itself, or a member of its sweep."""

    config: RunConfig
    overrides: tuple[str, ...]


def compose_members(program: str, arguments: Sequence[str], *, default: str | None = None) -> list[Member]:
    """Compose what a Hydra command line asks for: one member, or those of a sweep.

    A sweep is `-m` with values separated by commas, all combinations, or `--members FILE` with the overrides of one
    member in each line. Empty where Hydra answered by itself (`--cfg job`, `--help`). `default` is an override that
    holds where the command line has none of its key. Raises `UserError` for a command line that is wrong.
    """
    file, arguments = _without_members_option(list(arguments))
    refuse_repeated_keys(arguments)
    typed = arguments
    if default is not None and key_of(default) not in map(key_of, arguments):
        arguments = with_override(arguments, default)
    arguments = list(map(_readable, arguments))
    with errors_of_one_line():
        if file is not None:
            return _compose_points(program, arguments, _points_in(file, typed))
        if not set(_MULTIRUN) & set(arguments):
            return [_member(config, task) for config, task in _compose(program, arguments)]
        points = _points_of_sweep(arguments)
        if points is not None:
            fixed = [each for each in arguments if each not in _MULTIRUN and not _is_swept(each)]
            return _compose_points(program, fixed, points)
        # A sweep over config groups, or by another sweeper: Hydra composes each member from its files.
        return _numbered([_member(config, task) for config, task in _compose(program, arguments)])


def is_left_to_hydra(arguments: Sequence[str]) -> bool:
    """Whether a sweep chooses a sweeper or launcher of Hydra's (Optuna, submitit): those call their runs themselves."""
    return any(each.lstrip("+").startswith(("hydra/sweeper=", "hydra/launcher=")) for each in arguments)


def run_by_hydra(program: str, arguments: Sequence[str]) -> None:
    """Have Hydra run a sweep by its own sweeper and launcher. Raises `UserError` as `compose_members` does."""
    refuse_repeated_keys(arguments)
    line = with_override(list(map(_readable, arguments)), "hydra.sweep.dir=${paths.outputs}/hydra/${run.name}")
    with errors_of_one_line(), _command_line(program, line):
        _require_choices(line)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name="config")(_run_job)()


def _run_job(config: DictConfig) -> float | None:
    """One job of a sweep that Hydra runs, on whatever machine its launcher chose."""
    from pipeline.launch.run import objective_of, start
    from pipeline.terminal.display import Display
    from pipeline.workflow.plan import plan_run

    job = HydraConfig.get()
    member = _member(config, job.overrides.task)
    named = member.config.model_copy(update={"run": _run_of_member(member.config.run, int(job.job.num))})
    plan = plan_run(named, member.overrides)
    return objective_of(plan, start([plan], Display(), waits=True))


def with_override(arguments: Sequence[str], override: str) -> list[str]:
    """Add an override where Hydra's parser takes it: in front of the first one, whatever options stand around."""
    first = next((place for place, each in enumerate(arguments) if _is_override(each)), len(arguments))
    return [*arguments[:first], override, *arguments[first:]]


def registered_commands() -> Mapping[str, str]:
    """Commands beside those of the pipeline itself: name -> "module:function"."""
    commands = OmegaConf.to_container(OmegaConf.load(CONFIG_DIRECTORY / "commands.yaml"))
    assert isinstance(commands, dict), "conf/commands.yaml maps names to functions"
    return {str(name): str(function) for name, function in commands.items()}


def _compose(program: str, arguments: list[str]) -> list[tuple[DictConfig, list[str]]]:
    """Let Hydra compose a command line: each config with its overrides."""
    _require_choices(arguments)
    if all((key := key_of(each)) is not None and not key.startswith("hydra") for each in arguments):
        return [_compose_once(arguments)]
    composed: list[tuple[DictConfig, list[str]]] = []

    def collect(config: DictConfig) -> None:
        task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        assert isinstance(task, list), "Hydra keeps overrides in a list"
        composed.append((config, list(map(str, task))))

    # A sweep has Hydra write a file; planning writes nothing, and runs keep their own records.
    with TemporaryDirectory() as scratch:
        is_sweep = bool(set(_MULTIRUN) & set(arguments))
        line = with_override(arguments, f"hydra.sweep.dir={scratch}") if is_sweep else arguments
        with refusals_of_options(program), _command_line(program, line):
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name="config")(collect)()
    return composed


def _compose_once(overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Compose overrides alone: `hydra.main` would compose everything twice, first to learn whether they are a sweep."""
    with initialize_config_dir(str(CONFIG_DIRECTORY), version_base="1.3"):
        engine = GlobalHydra.instance().hydra
        assert engine is not None, "it was initialized in the line before"
        config = engine.compose_config("config", overrides, run_mode=RunMode.RUN, with_log_configuration=False)
    task = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(task, list), "Hydra keeps overrides in a list"
    with flag_override(config, ["struct", "readonly"], False):
        del config["hydra"]
    return config, list(map(str, task))


def _compose_points(program: str, fixed: list[str], points: list[list[str]]) -> list[Member]:
    """The members of a sweep: what they have in common is composed once, unless they choose config groups."""
    if any(_chooses_a_group(each) for point in points for each in point):
        composed = [_compose(program, [*fixed, *point]) for point in points]
        return _numbered([_member(config, task) for [(config, task)] in composed])
    common = _compose(program, fixed)
    if not common:
        return []
    ((config, task),) = common
    # Values that are resolved once are copied in a sixtieth of the time of a config: a large sweep feels that.
    resolved = _resolved_for(config, points)
    members = []
    for point in points:
        overrides = OverridesParser.create().parse_overrides(point)
        values = deepcopy(resolved)
        if values is None or not all(_set_plainly(values, override) for override in overrides):
            values = _values(_changed(deepcopy(config), overrides))
        members.append(_checked(values, [*task, *point]))
    return _numbered(members)


def _resolved_for(config: DictConfig, points: list[list[str]]) -> dict[str, Any] | None:
    """The values of a config; None where one that changes may be what another is interpolated from."""
    text = str(OmegaConf.to_container(config))
    named = re.findall(r"\$\{([\w.]+)\}", text)
    is_plain = text.count("${") == len(named) and not any(name.startswith(".") for name in named)
    changing = {f"{key_of(each)}." for point in points for each in point}
    clash = (f"{name}.".startswith(key) or key.startswith(f"{name}.") for name in named for key in changing)
    if not is_plain or any(clash):
        return None
    try:
        return _values(config)
    except MissingMandatoryValue:  # each member may give it one
        return None


def _set_plainly(values: dict[str, Any], override: Override) -> bool:
    """Set one value in the place of another, if that is all that an override does; whether it is."""
    *parents, last = str(override.key_or_group).split(".")
    place: Any = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    value, nested = override.value(), (dict, list)
    is_one = override.type is OverrideType.CHANGE and isinstance(place, dict) and last in place
    if not is_one or isinstance(value, nested) or isinstance(place[last], nested) or "${" in str(value):
        return False
    place[last] = value
    return True


def _changed(changed: DictConfig, overrides: list[Override]) -> DictConfig:
    for override in overrides:
        if override.is_delete():
            raise UserError(
                f"{override.input_line!r} removes a key, which members of a sweep cannot; remove it for all"
            )
        force_add = override.is_add() or override.is_force_add()
        OmegaConf.update(changed, override.key_or_group, override.value(), merge=True, force_add=force_add)
    return changed


def _points_of_sweep(arguments: list[str]) -> list[list[str]] | None:
    """All combinations of the swept values, the last one varying fastest; None for what only Hydra can sweep."""
    if any(each.startswith("-") and each not in _MULTIRUN for each in arguments):
        return None
    overrides = OverridesParser.create().parse_overrides([each for each in arguments if each not in _MULTIRUN])
    axes = []
    for override in overrides:
        if override.is_hydra_override() or (
            override.is_sweep_override() and _chooses_a_group(str(override.input_line))
        ):
            return None
        if override.is_sweep_override():
            if not (override.is_choice_sweep() or override.is_range_sweep()):
                return None
            prefix = "++" if override.is_force_add() else "+" if override.is_add() else ""
            axes.append([f"{prefix}{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
    return [list(point) for point in product(*axes)]


def _is_swept(argument: str) -> bool:
    (override,) = OverridesParser.create().parse_overrides([argument])
    return override.is_sweep_override()


def _points_in(file: Path, fixed: list[str]) -> list[list[str]]:
    """The overrides of each member: one line each, quoted as on a command line; # begins a comment."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"--members {file}: {error.strerror}; give a file with one member's overrides per line"
        ) from error
    points = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}; quote it as on a command line") from error
        point = list(map(_readable, words))
        if not all(map(_is_override, point)):
            raise UserError(f"{file}:{number}: {line!r} is no list of overrides; write key=value key=value")
        if any(_is_swept(each) for each in point):
            raise UserError(f"{file}:{number}: {line!r} has several values for a key; write one member per line")
        refuse_repeated_keys_of_member(fixed, words, f"{file}:{number}")
        if point:
            points.append(point)
    if not points:
        raise UserError(f"--members {file} has no member; write one member's overrides per line")
    return points


def _without_members_option(arguments: list[str]) -> tuple[Path | None, list[str]]:
    places = [place for place, each in enumerate(arguments) if each.split("=")[0] == _MEMBERS]
    if not places:
        return None, arguments
    if len(places) > 1:
        raise UserError(f"{_MEMBERS} is given {len(places)} times; give one file with all members")
    (place,) = places
    if set(_MULTIRUN) & set(arguments):
        raise UserError(f"{_MEMBERS} lists the members of a sweep and -m combines them; use one of the two")
    _, has_value, file = arguments[place].partition("=")
    after = place + 1
    if not has_value:
        if after == len(arguments):
            raise UserError(f"{_MEMBERS} needs a file; write {_MEMBERS} FILE")
        file, after = arguments[after], after + 1
    return Path(file), [*arguments[:place], *arguments[after:]]


def _chooses_a_group(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return "@" in key or "/" in key or (CONFIG_DIRECTORY / key).is_dir()


def _require_choices(arguments: Sequence[str]) -> None:
    """Refuse `data=null` and `data=3`, of which Hydra tells in a traceback."""
    chosen = [each for each in arguments if _is_override(each) and _chooses_a_group(each)]
    for override in OverridesParser.create().parse_overrides(chosen):
        value = override.value()
        if any(each is None or isinstance(each, int | float) for each in getattr(value, "list", [value])):
            names = sorted(path.stem for path in (CONFIG_DIRECTORY / override.key_or_group).glob("*.yaml"))
            raise UserError(f"{override.input_line!r} names no choice; there are {', '.join(names)}")


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _member(config: DictConfig, task: Sequence[str]) -> Member:
    return _checked(_values(config), task)


def _values(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict), "a composed config is a mapping"
    return {str(key): value for key, value in values.items()}


def _checked(values: dict[str, Any], task: Sequence[str]) -> Member:
    checked = validate(RunConfig, values)
    launcher_of(checked)
    secret = find_secret(checked.model_dump(mode="json"))
    if secret is not None:
        raise UserError(secret)
    return Member(checked, tuple(map(_as_typed, task)))


def _numbered(members: list[Member]) -> list[Member]:
    """The members of a sweep, named after it and their number."""
    return [
        replace(each, config=each.config.model_copy(update={"run": _run_of_member(each.config.run, number)}))
        for number, each in enumerate(members)
    ]


def _run_of_member(run: RunSettings, number: int) -> RunSettings:
    return validate(RunSettings, {**run.model_dump(), "name": f"{run.name}.{number}", "group": run.name}, "run")


def _readable(argument: str) -> str:
    """The override as Hydra's grammar takes it, which keeps braces for mappings: brace patterns get quotes.

    Settings of one stage hold only what differs from the run's, so Hydra must be let add keys that are not there.
    """
    if _is_override(argument) and "{" in argument and not _is_parsed(argument):
        plain = with_plain_keys(argument)
        argument = plain if _is_parsed(plain) else with_quoted_braces(argument)
    return f"++{argument}" if _OF_ONE_STAGE.match(argument) else argument


def _is_parsed(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _as_typed(override: str) -> str:
    typed = override.removeprefix("++")
    return typed if _OF_ONE_STAGE.match(typed) else override


@contextmanager
def _command_line(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """Hand Hydra its arguments, and have it raise its errors to us instead of printing them and exiting with 1."""
    argv, environment = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if environment is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = environment
