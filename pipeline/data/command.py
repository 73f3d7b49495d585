"""`unclip shards index PATH` and `unclip shards check PATH`."""

import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.captions import parse_sources
from pipeline.data.indexing import Indexed, IndexProgress, Report, index_place
from pipeline.data.place import DEFAULT_CACHE_DIR, ShardPlace
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.shards import passed_over
from pipeline.data.summary import IndexSummary, ShardEntry
from pipeline.errors import UserError
from pipeline.options import OptionParser

EXIT_FAULTY = 1

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN_SHARDS = 3


def shards_command(arguments: Sequence[str]) -> int:
    """Index or check the shards that are named."""
    parser = OptionParser("unclip shards", description="Indices of WebDataset shards, and what is in them.")
    actions = parser.add_subparsers(dest="action", required=True)
    index = actions.add_parser("index", help="walk shards and write an index beside them")
    check = actions.add_parser("check", help="read and decode every sample of indexed shards; exit status 1 for faults")
    for action in (index, check):
        action.add_argument("shards", nargs="+", help="directories, brace patterns, paths or URLs")
        action.add_argument("--allow-shell-urls", action="store_true", help="run the commands of pipe: URLs")
        action.add_argument("--index", type=Path, metavar="DIR", help="where the index is (default: beside the shards)")
        action.add_argument("--cache", type=Path, default=DEFAULT_CACHE_DIR, help="where remote shards are kept")
        action.add_argument("--cache-gib", type=_number(float), help="how much of them is kept (default: all)")
        action.add_argument(
            "--workers", type=_number(int), default=os.cpu_count() or 1, help="shards that are read at once"
        )
    index.add_argument(
        "--again", action="store_true", help="walk shards again that have not changed, and fetch URLs anew"
    )
    check.add_argument("--caption", default="txt", help="where captions are: an extension, or json:FIELD")
    options = parser.parse_args(arguments)
    place = ShardPlace(
        shards=tuple(options.shards),
        allow_shell_urls=options.allow_shell_urls,
        cache_dir=options.cache.absolute(),
        cache_gib=options.cache_gib,
        index_dir=None if options.index is None else options.index.absolute(),
    )
    _say_what_is_passed_over(place)
    if options.action == "index":
        return _index(place, options.workers, options.again)
    return _check(place, options.workers, options.caption)


def _number(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A finite number above 0, as an option gives it."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def _say_what_is_passed_over(place: ShardPlace) -> None:
    for part in place.shards:
        directory = Path(part).expanduser()
        if directory.is_dir():
            for what, count in passed_over(directory).items():
                print(f"{directory}: passed over {count:,} {what}")


def _index(place: ShardPlace, workers: int, again: bool) -> int:
    started = time.monotonic()
    try:
        with _interruptible(), _progress() as report:
            indexed = index_place(place, workers, report, again=again)
    except KeyboardInterrupt:
        print("stopped; the shards that were walked are kept, and the same command goes on", file=sys.stderr)
        raise
    elapsed_s = time.monotonic() - started
    for each in indexed:
        if each.index is not None:
            _print_index(each)
    refused = [reason for each in indexed for reason in each.refused]
    if refused:
        others = f" ({len(refused) - 1} others too)" if len(refused) > 1 else ""
        kept = sum(len(each.index) for each in indexed if each.index is not None)
        raise UserError(f"{refused[0]}{others}; the other shards are indexed, with {kept:,} samples")
    print(f"{elapsed_s:.1f} s")
    return 0


def _print_index(indexed: Indexed) -> None:
    assert indexed.index is not None
    summary = IndexSummary(indexed.index.shards, "")
    texts = ", ".join(f"{name} ({count:,})" for name, count in summary.texts.most_common())
    print(f"{summary.samples:,} samples in {len(summary.shards):,} shards; index in {indexed.directory}")
    if texts:
        print(f"texts: {texts}")
    _print_reasons("left out", summary.left_out, summary.shards)
    _print_reasons("skipped", summary.skipped, ())


def _print_reasons(title: str, counts: Mapping[str, int], shards: Sequence[ShardEntry]) -> None:
    for reason, count in Counter(counts).most_common():
        worst = [shard for shard in shards if reason in shard.left_out][:_SHOWN_SHARDS]
        where = f" (in {', '.join(shard.name for shard in worst)})" if worst else ""
        print(f"{title}: {count:,} {reason}{where}: {EXPLANATIONS[reason]}")


def _check(place: ShardPlace, workers: int, caption: str) -> int:
    from pipeline.data.check import check_shards

    samples, shards, faults = 0, 0, Counter[str]()
    for report in check_shards(place, parse_sources({caption: 1.0}), workers):
        samples += report.samples
        shards += 1
        faults.update(report.faults)
        if report.faults:
            print(f"{Path(report.name).name}: {_counts(report.faults)}", flush=True)
    for reason in faults:
        print(f"{reason}: {EXPLANATIONS[reason]}")
    print(f"{samples:,} samples in {shards:,} shards: {_counts(faults) if faults else 'all can be used'}")
    return EXIT_FAULTY if faults else 0


def _counts(faults: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(faults).most_common())


@contextmanager
def _progress() -> Iterator[Report]:
    """Shows how far an indexing is: a bar in a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[samples]:,} samples"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, samples=0)
        yield lambda done: bar.update(task, total=done.shards, completed=done.shards_done, samples=done.samples)


def _lines() -> Report:
    said_at = time.monotonic()

    def report(done: IndexProgress) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            print(
                f"{done.shards_done:,} of {done.shards:,} shards, {done.samples:,} samples", file=sys.stderr, flush=True
            )

    return report


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what was walked is kept."""
    # Not by sending SIGINT: a shell has what it runs in the background ignore that.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
