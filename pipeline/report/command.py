"""`unclip compare RUN_OR_PATTERN ...` and `unclip card RUN`."""

import argparse
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.report.records import State, read_comparison
from pipeline.report.select import select_runs
from pipeline.report.sweep import SweepView, chosen_metric
from pipeline.report.table import columns, named_columns, table_csv, table_json
from pipeline.report.terminal import print_comparison, print_effects
from pipeline.terminal.tables import new_console
from pipeline.workflow.runs import read_run
from pipeline.workflow.sealed import warn


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip compare` takes beside `--outputs`."""
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="a run, a sweep, a pattern ('lambda.*') or sweep:NAME, for its effects"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one HTML file that opens from disk")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="STAGE.METRIC",
        help="a column to show; with sweep:NAME, the metric whose effects are shown",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print all columns as CSV")
    form.add_argument("--json", action="store_true", help="print all that is known as JSON")


def compare(options: argparse.Namespace) -> int:
    """Print the table, CSV or JSON, and write the HTML file where one is asked for."""
    outputs = options.outputs
    selection = select_runs(outputs, options.runs)
    comparison = read_comparison(outputs, selection.records)
    sweep = comparison.only(selection.members)
    metric = chosen_metric(sweep, options.metric[0] if options.metric else None) if sweep.runs else None
    if options.metric:
        named_columns(columns(comparison), options.metric)
    for line in selection.unreadable:
        print(f"left out: {line}", file=sys.stderr)
    if options.output is not None:
        from pipeline.report.page import write_page

        # Before anything is printed: a reader of the table who leaves early does not cost the file.
        _require_directory(options.output)
        write_page(comparison, options.output, None if metric is None else SweepView(sweep, metric))
    if options.csv:
        sys.stdout.write(table_csv(comparison))
    elif options.json:
        sys.stdout.write(table_json(comparison))
    else:
        console = new_console()
        print_comparison(console, comparison, options.metric)
        if metric is not None:
            print_effects(console, sweep, metric)
    if options.output is not None:
        print(f"report: {options.output}", file=sys.stderr if options.csv or options.json else sys.stdout)
    return 0


def _require_directory(file: Path) -> None:
    try:
        is_possible = file.absolute().parent.is_dir() and not file.is_dir()
    except OSError:
        is_possible = False
    if not is_possible:
        raise UserError(f"--output {file} cannot be written; give a file in a directory that is there")


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip card` takes beside `--outputs`."""
    parser.add_argument("run", help="name of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: runs/RUN/README.md)")


def card(options: argparse.Namespace) -> int:
    """Write the card and say where."""
    from pipeline.report.card import write_card

    if options.output is not None:
        _require_directory(options.output)
    comparison = read_comparison(options.outputs, [read_run(options.outputs, options.run)])
    try:
        written = write_card(comparison, options.output)
    except OSError as error:
        remedy = "give --output a file in a directory of yours"
        raise UserError(
            f"the card of {options.run} cannot be written ({error.strerror}: {error.filename}); {remedy}"
        ) from error
    for stage in comparison.runs[0].stages:
        if stage.state is State.DAMAGED:
            warn(f"stage {stage.name} is damaged: {stage.detail}")
    print(f"card: {written}")
    return 0
