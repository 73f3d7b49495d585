"""What Hydra finds wrong with a command line, in one line: the key or the option, the rule and the remedy."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pipeline.errors import UserError

_TWO_VALUES = "Multiple values for "  # how Hydra begins its complaint


@contextmanager
def refusals_of_options(program: str) -> Iterator[None]:
    """Hydra's parser prints its usage above what it refuses, and exits: here that is a `UserError`."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            fault = said.getvalue().strip().rpartition("error: ")[2]
            raise UserError(f"{fault}; see {program} --help") from exit_
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())


@contextmanager
def errors_of_one_line() -> Iterator[None]:
    """To be put around Hydra, which would print a headline of its own above an error raised inside."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    except ValueError as error:
        # Hydra's parser hands Python's refusal of a number of thousands of digits through.
        if "integer string conversion" not in str(error):
            raise
        raise UserError(f"an override has a value that cannot be read ({error}); give a shorter one") from error


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause)
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} has no value; set {cause.full_key}=..."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read as an override ({error.message.splitlines()[0]}); write key=value, "
            "and \"key='...'\" around a value with special characters"
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
