"""What `unclip` prints, where the command needs no process of its own: one takes seconds to start."""

import io
from contextlib import redirect_stdout

import pytest

from pipeline.cli import EXIT_USER_ERROR, main


def said(*arguments: str) -> str:
    """What a command prints that ends well, in lines of 200 characters."""
    output = io.StringIO()
    with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        status = main(arguments)
    assert status == 0, output.getvalue()
    return output.getvalue()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with status 2."""
    assert main(arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("unclip: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status of a command, and all that it printed, in one line."""
    status = main(arguments)
    found = capsys.readouterr()
    return status, " ".join(f"{found.out} {found.err}".split())
