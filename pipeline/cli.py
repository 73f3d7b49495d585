"""The `unclip` command. Imports no torch: plans and finished runs answer at once."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.errors import UserError, is_disk_full
from pipeline.options import command_parser
from pipeline.workflow.declaration import resolve
from pipeline.workflow.progress import EXIT_INTERRUPTED

EXIT_FAILED = 1
EXIT_USER_ERROR = 2

_FORECAST = "--forecast"
_ACCEPT_CODE = "--accept-code"
_PICTURES_OF_RUNS = 8
_STORE = {
    "du": "What runs and sweeps hold on disk, what they share, and what no run needs.",
    "gc": "Say what no run needs, and remove it with --delete. What is at work, pinned or young stays.",
    "rm": "Say what goes with runs or sweeps, and remove it with --delete. What another run needs stays.",
    "mv": "Rename a run, or a sweep with its members.",
    "push": "Copy a run and its finished stages to a store elsewhere.",
    "pull": "Fetch a run and its stages from a store elsewhere, and verify them.",
}

USAGE = """\
unclip trains DALL·E 2 from captioned images: CLIP, prior, decoder with a CLIP loss, upsamplers.

  unclip run [key=value ...] [-m]     train what is not finished (no overrides: the demo); -m sweeps over a=1,2,
                                      --members FILE over the overrides in its lines; --accept-code goes on from
                                      checkpoints of other code
  unclip plan [key=value ...] [-m]    say for each stage: reuse, resume, run or blocked, and why; --forecast: FLOPs,
                                      memory, time, cost and disk too, on forecast.device=here or a named one
  unclip submit [key=value ...] [-m]  give a queue (Slurm) a job for each stage that is not finished, and return
  unclip status [RUN]                 where the stages of a run or sweep stand
  unclip logs RUN STAGE               a stage's log; -f follows it
  unclip cancel RUN                   stop a run's jobs and commands, but for those that other runs count on
  unclip verify [RUN|--all]           read everything that has a digest, and set aside what is damaged
  unclip sync [RUN]                   upload W&B runs that were tracked offline, and what an outage kept back
  unclip compare RUN ...              a table of runs or a sweep; --output report.html: curves and pictures too
  unclip card RUN                     write a run's model card
  unclip board                        the same page of all runs, served to a browser, live
  unclip shards index PATH            index WebDataset shards for data=webdataset
  unclip shards check PATH            read and decode all of them, and say what cannot be used
  unclip du                           what runs hold on disk and share, and what no run needs
  unclip gc                           what could go of what no run needs; --delete removes it
  unclip rm RUN                       what goes with a run or sweep; --delete removes it
  unclip mv RUN NEW                   rename a run or sweep
  unclip push RUN URL                 copy a run and its finished stages to s3://… or a directory; pull fetches it
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
    except OSError as error:
        where = f" for {error.filename}" if error.filename else ""
        if is_disk_full(error):
            print(f"unclip: no space is left{where}; free some and run the same command again", file=sys.stderr)
        elif error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO):
            print(f"unclip: {error.strerror}{where}: a file or directory is in the way; move it away", file=sys.stderr)
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            print(f"unclip: there is no right to write or read{where}; get it, or set paths.outputs", file=sys.stderr)
        else:
            raise
        return EXIT_USER_ERROR


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
    return {
        "run": _run,
        "plan": _plan,
        "submit": _submit,
        "status": _status,
        "logs": _logs,
        "cancel": _cancel,
        "verify": _verify,
        "sync": _sync,
        "compare": _compare,
        "card": _card,
        "board": _board,
        "shards": _shards,
        **{name: partial(_store, name) for name in _STORE},
    }


def _plan(arguments: list[str]) -> int:
    from pipeline.compose import compose_members
    from pipeline.forecast.parameters import require_parameters
    from pipeline.launch.launcher import launcher_of
    from pipeline.terminal.tables import new_console, plan_table
    from pipeline.workflow.plan import plan_run

    console = new_console()
    asks_forecast = _FORECAST in arguments
    arguments = [each for each in arguments if each != _FORECAST]
    plans = [plan_run(member.config, member.overrides) for member in compose_members("unclip plan", arguments)]
    for plan in plans:
        console.print(plan_table(plan))
        for stage in plan.stages:
            if stage.notice is not None:
                console.print(f"{stage.name}: {stage.notice}", soft_wrap=True, markup=False)
    require_parameters(plans)
    if plans and not any(plan.blocked for plan in plans):
        launcher = launcher_of(plans[0].config)
        launcher.check(plans)
        for each in launcher.preview([plan.with_code() for plan in plans]):
            console.print(each, soft_wrap=isinstance(each, str), markup=False)
    if asks_forecast:
        from pipeline.forecast.estimate import forecast
        from pipeline.forecast.table import forecast_lines

        for plan in plans:
            for each in forecast_lines(plan.config.run.name, forecast(plan)):
                console.print(each, soft_wrap=isinstance(each, str), markup=False)
    return 0


def _run(arguments: list[str]) -> int:
    from pipeline.compose import is_left_to_hydra, run_by_hydra

    if is_left_to_hydra(arguments):
        if _ACCEPT_CODE in arguments:
            raise UserError(
                f"{_ACCEPT_CODE} is not for Hydra's own sweepers; finish the member that asks for it by itself"
            )
        run_by_hydra("unclip run", arguments)
        return 0
    return _start("unclip run", arguments, waits=True)


def _submit(arguments: list[str]) -> int:
    return _start("unclip submit", arguments, waits=False, default="launch=slurm")


def _start(program: str, arguments: list[str], *, waits: bool, default: str | None = None) -> int:
    from pipeline.compose import compose_members
    from pipeline.forecast.parameters import require_parameters
    from pipeline.launch.run import start
    from pipeline.terminal.display import Display
    from pipeline.workflow.plan import plan_run
    from pipeline.workflow.progress import Outcome

    accepts_code = _ACCEPT_CODE in arguments
    arguments = [each for each in arguments if each != _ACCEPT_CODE]
    members = compose_members(program, arguments, default=default)
    plans = [plan_run(member.config, member.overrides) for member in members]
    require_parameters(plans)
    outcomes = start(plans, Display(), waits=waits, accepts_code=accepts_code)
    failures = [each for each in outcomes if each.outcome is Outcome.FAILED]
    if any(each.outcome is Outcome.INTERRUPTED for each in outcomes):
        return EXIT_INTERRUPTED
    if failures and all(each.failure is not None and each.failure.is_user_error for each in failures):
        return EXIT_USER_ERROR
    return EXIT_FAILED if failures else 0


def _status(arguments: list[str]) -> int:
    parser = command_parser("status", "Where the stages of a run or sweep stand.")
    parser.add_argument("run", nargs="?", help="name of a run or sweep; without it, the latest run")
    options = parser.parse_args(arguments)
    from pipeline.launch.launcher import state_tables
    from pipeline.terminal.display import shown_path
    from pipeline.terminal.tables import new_console, unfinished_logs
    from pipeline.workflow.runs import gather_pictures, is_finished, latest_run, read_runs, run_names

    outputs = options.outputs
    names = run_names(outputs)
    title = latest_run(outputs) if options.run is None else options.run
    records = read_runs(outputs, title)
    console = new_console()
    tables, notes = state_tables(outputs, records, f"run {title}")
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    for table in tables:
        console.print(table)
    for record in records[:_PICTURES_OF_RUNS]:
        if is_finished(outputs, record) and (pictures := gather_pictures(outputs, record)):
            console.print(f"pictures: {shown_path(pictures[0].parent)}", soft_wrap=True, markup=False)
    if len(records) > _PICTURES_OF_RUNS:
        console.print(f"pictures of a later one: unclip status {records[-1].name}", soft_wrap=True, markup=False)
    for log in unfinished_logs(outputs, records):
        console.print(f"log: {shown_path(log)}", soft_wrap=True, markup=False)
    others = [name for name in names if name not in {record.name for record in records}]
    if others and options.run is None:
        console.print(f"other runs: {', '.join(others)}", soft_wrap=True)
    return 0


def _logs(arguments: list[str]) -> int:
    parser = command_parser("logs", "The log of a stage, on all its starts.")
    parser.add_argument("run", help="name of a run")
    parser.add_argument("stage", help="name of a stage")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on as it grows, until the stage is finished or Ctrl-C comes"
    )
    parser.add_argument("-n", "--lines", type=int, default=0, help="only so many lines from the end; 0: all")
    options = parser.parse_args(arguments)
    from pipeline.launch.launcher import launcher_named
    from pipeline.terminal.logs import show_log
    from pipeline.workflow.runs import read_run, store_of

    record = read_run(options.outputs, options.run)
    launcher = launcher_named(record.config.get("launch", {}).get("kind"))
    log = launcher.log(options.outputs, record, options.stage)
    keys = [(stage.name, stage.fingerprint) for stage in record.stages if stage.name == options.stage]
    store = store_of(options.outputs, [record])
    show_log(log, options.lines, lambda: options.follow and not any(store.readable(*key) for key in keys))
    return 0


def _cancel(arguments: list[str]) -> int:
    parser = command_parser(
        "cancel", "Stop the jobs and commands of a run or sweep, but for those that other runs count on."
    )
    parser.add_argument("run", help="name of a run or sweep")
    options = parser.parse_args(arguments)
    from pipeline.launch.launcher import launchers
    from pipeline.workflow.runs import read_runs

    records = read_runs(options.outputs, options.run)
    lines = [line for launcher in launchers().values() for line in launcher.cancel(options.outputs, records)]
    print("\n".join(lines) or f"{options.run} is nowhere at work")
    return 0


def _verify(arguments: list[str]) -> int:
    parser = command_parser("verify", "Compare artifacts and checkpoints with their digests, all of them anew.")
    parser.add_argument("run", nargs="?", help="name of a run or sweep; without it, the latest run")
    parser.add_argument("--all", action="store_true", dest="every", help="all that there is, of whichever run")
    options = parser.parse_args(arguments)
    from pipeline.terminal.verify import verify
    from pipeline.workflow.runs import latest_run

    if options.every and options.run is not None:
        raise UserError(f"--all does not go with {options.run}; give one of the two")
    if options.every or options.run is not None:
        return verify(options.outputs, options.run)
    run = latest_run(options.outputs)
    print(f"the latest run, {run} (--all: all that there is)", flush=True)
    return verify(options.outputs, run)


def _sync(arguments: list[str]) -> int:
    from pipeline.tracking.sync import main

    return main(arguments)


def _compare(arguments: list[str]) -> int:
    from pipeline.report.command import add_compare_options, compare

    parser = command_parser("compare", "Runs side by side, from their own records.")
    add_compare_options(parser)
    return compare(parser.parse_intermixed_args(arguments))


def _card(arguments: list[str]) -> int:
    from pipeline.report.command import add_card_options, card

    parser = command_parser("card", "A run's model card, in Markdown.")
    add_card_options(parser)
    return card(parser.parse_args(arguments))


def _board(arguments: list[str]) -> int:
    from pipeline.board.command import add_board_options, board

    parser = command_parser("board", "The report of all runs in a browser, live.")
    add_board_options(parser)
    return board(parser.parse_intermixed_args(arguments))


def _shards(arguments: list[str]) -> int:
    from pipeline.data.command import shards_command
    from pipeline.secrecy import find_secret

    secret = find_secret({"shards": arguments})
    if secret is not None:
        raise UserError(secret.replace("the run's records", "the index"))
    return shards_command(arguments)


def _store(command: str, arguments: list[str]) -> int:
    from pipeline.store import command as store

    parser = command_parser(command, _STORE[command])
    getattr(store, f"add_{command}_options")(parser)
    return getattr(store, command)(parser.parse_intermixed_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
