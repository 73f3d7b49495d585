"""What `unclip` prints, where the command needs no process of its own: one takes seconds to start."""

import io
from contextlib import redirect_stdout

import pytest

from pipeline.cli import main


def said(*arguments: str) -> str:
    """What a command prints that ends well, in lines of 200 characters."""
    output = io.StringIO()
    with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        status = main(arguments)
    assert status == 0, output.getvalue()
    return output.getvalue()
