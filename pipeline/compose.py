"""The one door to Hydra: from a command line to validated configs, with every fault a `UserError` of one line."""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pipeline.config import RunConfig, validate
from pipeline.errors import UserError

CONFIG_DIRECTORY = Path(__file__).resolve().parent.parent / "conf"
_OF_ONE_STAGE = re.compile(r"(stage\.[^.=]+\.trainer|launch\.stages\.[^.=]+|launch\.environment)\.[^=]+=")
_TWO_VALUES = "Multiple values for "  # how Hydra begins its complaint


@dataclass(frozen=True)
class Member:
    """One composed config of a command line: the run itself, or a member of its sweep."""

    config: RunConfig
    overrides: tuple[str, ...]


def compose_members(program: str, arguments: Sequence[str]) -> list[Member]:
    """Compose what a Hydra command line asks for: one member, or with `-m` one for each point of the sweep.

    Empty where Hydra answered by itself (`--cfg job`, `--help`). Raises `UserError` for a command line that is wrong.
    """
    composed: list[tuple[DictConfig, HydraConf]] = []

    def collect(config: DictConfig) -> None:
        composed.append((config, HydraConfig.get()))

    # A sweep has Hydra write a file; planning writes nothing, and runs keep their own records.
    with (
        TemporaryDirectory() as scratch,
        _command_line(program, _with_sweep_dir(list(map(_addable, arguments)), scratch)),
    ):
        try:
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIRECTORY), config_name="config")(collect)()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_one_line(error)) from error
        except SystemExit as exit_:
            if exit_.code not in (None, 0):
                raise
    # Outside of Hydra, which would print a headline of its own above an error.
    return [_member(config, runtime) for config, runtime in composed]


def registered_commands() -> Mapping[str, str]:
    """Commands beside those of the pipeline itself: name -> "module:function"."""
    commands = OmegaConf.to_container(OmegaConf.load(CONFIG_DIRECTORY / "commands.yaml"))
    assert isinstance(commands, dict), "conf/commands.yaml maps names to functions"
    return {str(name): str(function) for name, function in commands.items()}


def _member(config: DictConfig, runtime: HydraConf) -> Member:
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict), "a composed config is a mapping"
    if runtime.mode == RunMode.MULTIRUN:
        sweep = values["run"]["name"]
        values["run"] |= {"name": f"{sweep}.{runtime.job.num}", "group": sweep}
    overrides = tuple(_as_typed(override) for override in runtime.overrides.task)
    return Member(validate(RunConfig, _string_keys(values)), overrides)


def _with_sweep_dir(arguments: list[str], directory: str) -> list[str]:
    """Add Hydra's setting in front of the first override, where its parser takes it whatever options stand around."""
    if not {"-m", "--multirun"} & set(arguments):
        return arguments
    first = next((place for place, each in enumerate(arguments) if "=" in each and not each.startswith("-")), None)
    if first is None:
        return arguments
    return [*arguments[:first], f"hydra.sweep.dir={directory}", *arguments[first:]]


def _addable(argument: str) -> str:
    """Settings of one stage hold only what differs from the run's, so Hydra must be let add keys that are not there."""
    return f"++{argument}" if _OF_ONE_STAGE.match(argument) else argument


def _as_typed(override: str) -> str:
    typed = override.removeprefix("++")
    return typed if _OF_ONE_STAGE.match(typed) else override


def _string_keys(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}


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


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} has no value; set {cause.full_key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read as an override ({error.message.splitlines()[0]}); write key=value, "
            "and key='...' around a value with special characters"
        )
    if isinstance(error, ConfigCompositionException) and str(error).startswith(_TWO_VALUES):
        group = str(error).removeprefix(_TWO_VALUES).split(".")[0]
        return f"{group} has a value already; write {group}=... without the +"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{error.missing_cfg_file!r} is no choice; there are {', '.join(sorted(error.options))}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause).splitlines()[0]}; mend this key"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unknown_key(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key)
    parent = error.parent_node
    valid = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    close = get_close_matches(str(error.key), valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{key} is an unknown key; {hint}valid keys here: {', '.join(valid)}"
