"""`unclip compare RUN_OR_PATTERN ...` and `unclip card RUN`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.errors import UserError
from pipeline.report.records import Comparison, read_comparison
from pipeline.report.select import is_sweep, select_runs
from pipeline.report.sweep import chosen_metric
from pipeline.report.table import table_csv, table_json
from pipeline.report.terminal import print_comparison, print_effects


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
    comparison = read_comparison(options.outputs.absolute(), select_runs(options.outputs.absolute(), options.runs))
    metric = None
    if any(is_sweep(name) for name in options.runs):
        metric = chosen_metric(comparison, options.metric[0] if options.metric else None)
    if options.csv:
        sys.stdout.write(table_csv(comparison))
    elif options.json:
        sys.stdout.write(table_json(comparison))
    else:
        _print(comparison, options.metric, metric)
    if options.output is not None:
        from pipeline.report.page import write_page

        _require_directory(options.output)
        write_page(comparison, options.output, metric)
        print(f"report: {options.output}", file=sys.stderr if options.csv or options.json else sys.stdout)
    return 0


def _print(comparison: Comparison, columns: Sequence[str], metric: str | None) -> None:
    console = Console(highlight=False)
    print_comparison(console, comparison, columns)
    if metric is not None:
        print_effects(console, comparison, metric)


def _require_directory(file: Path) -> None:
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise UserError(f"--output {file} cannot be written; give a file in a directory that is there")
