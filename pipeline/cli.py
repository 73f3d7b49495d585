"""The `unclip` command. Imports no torch: plans and finished runs answer at once."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.workflow.declaration import resolve

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75

USAGE = """\
unclip trains DALL·E 2 from captioned images: CLIP, prior, decoder with a CLIP loss, upsamplers.

  unclip run [key=value ...] [-m]     train what is not finished (no overrides: the demo); -m sweeps over a=1,2
  unclip plan [key=value ...] [-m]    say for each stage: reuse, resume, run or blocked, and why
  unclip status [RUN]                 where a run's stages stand
  unclip shards index PATH            index WebDataset shards for data=webdataset
  unclip shards check PATH            read and decode all of them, and say what cannot be used
{registered}
`unclip run --help` lists the config groups, `unclip run --cfg job` prints the composed config.
`unclip COMMAND --help` says more of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status is 0, 1 (a stage failed), 2 (the user can mend it) or 75 (stopped, resumable)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"unclip: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`unclip plan | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    commands = _commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        from pipeline.compose import registered_commands

        names = "".join(f"  unclip {name}\n" for name in registered_commands())
        print(USAGE.format(registered=names))
        return 0
    name, rest = argv[0], argv[1:]
    if name in commands:
        return commands[name](rest)
    from pipeline.compose import registered_commands

    registered = registered_commands()
    if name not in registered:
        raise UserError(f"{name!r} is no command; commands are {', '.join([*commands, *registered])}")
    return resolve(registered[name])(rest)


def _commands() -> dict[str, Callable[[list[str]], int]]:
    return {"run": _run, "plan": _plan, "status": _status, "shards": _shards}


def _plan(arguments: list[str]) -> int:
    from rich.console import Console

    from pipeline.compose import compose_members
    from pipeline.workflow.plan import plan_run
    from pipeline.workflow.summary import plan_table

    console = Console(highlight=False)
    for member in compose_members("unclip plan", arguments):
        console.print(plan_table(plan_run(member.config, member.overrides)))
    return 0


def _run(arguments: list[str]) -> int:
    from pipeline.compose import compose_members
    from pipeline.workflow.display import Display
    from pipeline.workflow.local import run_plans
    from pipeline.workflow.plan import plan_run
    from pipeline.workflow.progress import Outcome
    from pipeline.workflow.runs import PICTURES, gather_pictures, read_run, record_run
    from pipeline.workflow.summary import result_table

    plans = [plan_run(member.config, member.overrides) for member in compose_members("unclip run", arguments)]
    for plan in plans:
        if plan.blocked:
            first = plan.blocked[0]
            raise UserError(f"stage {first.name} is blocked: {first.reason}")
    directories = [record_run(plan) for plan in plans]
    display = Display()
    outcomes = run_plans(plans, display)
    for plan, directory in zip(plans, directories, strict=True):
        record = read_run(plan.store.outputs, plan.config.run.name)
        display.table(result_table(plan.store.outputs, record))
        pictures = gather_pictures(plan.store.outputs, record)
        display.note(f"run:      {_shown(directory)}")
        if pictures:
            display.note(f"pictures: {_shown(directory / PICTURES)}")
    failures = [each for each in outcomes if each.outcome is Outcome.FAILED]
    if any(each.outcome is Outcome.INTERRUPTED for each in outcomes):
        return EXIT_INTERRUPTED
    if failures and all(each.failure is not None and each.failure.is_user_error for each in failures):
        return EXIT_USER_ERROR
    return EXIT_FAILED if failures else 0


def _status(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("unclip status", description="Where a run's stages stand.")
    parser.add_argument("run", nargs="?", help="name of a run; without it, the latest")
    add_outputs_option(parser)
    options = parser.parse_args(arguments)
    from rich.console import Console

    from pipeline.workflow.runs import read_run, run_names
    from pipeline.workflow.summary import status_table, unfinished_logs

    outputs = options.outputs.absolute()
    names = run_names(outputs)
    record = read_run(outputs, options.run or (names[0] if names else "demo"))
    console = Console(highlight=False)
    console.print(status_table(outputs, record))
    for log in unfinished_logs(outputs, record):
        console.print(f"log: {_shown(log)}", soft_wrap=True, markup=False)
    others = [name for name in names if name != record.name]
    if others and options.run is None:
        console.print(f"other runs: {', '.join(others)}", soft_wrap=True)
    return 0


def _shards(arguments: list[str]) -> int:
    from pipeline.data.command import shards_command

    return shards_command(arguments)


def add_outputs_option(parser: argparse.ArgumentParser) -> None:
    """`--outputs`: where runs are, for the commands that compose no config."""
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="paths.outputs of the run")


def _shown(path: Path) -> str:
    """The path as a person would write it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
