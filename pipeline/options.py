"""Options of commands that compose no config."""

import argparse
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """One whose refusals are those of all of ours: a line, by `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed."""
        raise UserError(f"{message}; see {self.prog} --help")


def command_parser(command: str, description: str) -> OptionParser:
    """For a command of that name. It has `--outputs`, an absolute path, which says where runs are."""
    parser = OptionParser(f"unclip {command}", description=description)
    add_outputs(parser)
    return parser


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add `--outputs`, an absolute path."""
    parser.add_argument(
        "--outputs", type=lambda text: Path(text).absolute(), default="outputs", help="paths.outputs of the run"
    )
