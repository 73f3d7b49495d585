"""`unclip du`, `unclip gc`, `unclip rm` and `unclip mv`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pipeline.errors import UserError, is_disk_full
from pipeline.store import remote
from pipeline.store.collect import DEFAULT_AGE, find, make_room, pin, take_away
from pipeline.store.references import jobs_at_work
from pipeline.store.removable import Removable, measured
from pipeline.store.runs import removal_of, remove_runs, rename_run
from pipeline.store.trash import empty_trash, in_trash
from pipeline.store.usage import Holding, usage_of
from pipeline.terminal.display import shown_path
from pipeline.terminal.tables import new_console, new_table
from pipeline.terminal.words import format_bytes
from pipeline.workflow.runs import read_runs, require_outputs, run_directory

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SHOWN = 40
_NAMED = 5


def add_du_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip du` takes beside `--outputs`."""
    parser.add_argument("--json", action="store_true", help="print all of it as JSON, in bytes")


def du(options: argparse.Namespace) -> int:
    """Print what is held, shared and not needed."""
    require_outputs(options.outputs)
    usage = usage_of(options.outputs)
    for line in usage.unreadable:
        print(f"left out: {line}", file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(usage), indent=2))
        return 0
    console = new_console()
    _show_holdings(console, "runs", usage.runs)
    _show_holdings(console, "sweeps", usage.sweeps)
    for what, size in usage.rest.items():
        console.print(f"{format_bytes(size):>8}  {what}", markup=False, soft_wrap=True)
    console.print(f"{format_bytes(usage.total_bytes):>8}  in all under {shown_path(options.outputs)}", soft_wrap=True)
    return 0


def _show_holdings(console: Console, title: str, holdings: Sequence[Holding]) -> None:
    table = new_table(title, title.removesuffix("s"), "stages", "holds", "shared", "alone", "")
    for each in holdings[:_SHOWN]:
        sizes = map(format_bytes, (each.bytes, each.shared_bytes, each.alone_bytes))
        table.add_row(each.name, str(each.stages), *sizes, "pinned" if each.is_pinned else "")
    if holdings[_SHOWN:]:
        table.add_row(f"{len(holdings) - _SHOWN} smaller ones")
    if holdings:
        console.print(table)


def add_gc_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip gc` takes beside `--outputs`."""
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--delete", action="store_true", help="do it; without this, say what would be done")
    parser.add_argument(
        "--older-than", default=DEFAULT_AGE, metavar="AGE", help=f"as in 4w, 30d, 12h or 90m (default: {DEFAULT_AGE})"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="those of finished stages too")
    parser.add_argument("--caches", action="store_true", help="the compiler's cache too")
    act.add_argument("--pin", metavar="RUN", help="keep all that a run or sweep made; removes nothing")
    act.add_argument("--unpin", metavar="RUN", help="take that back; removes nothing")


def gc(options: argparse.Namespace) -> int:
    """Print what no run needs, and remove it where that is asked for."""
    outputs = options.outputs
    for name, is_pinned in ((options.pin, True), (options.unpin, False)):
        if name is not None:
            print(f"{'pinned' if is_pinned else 'unpinned'}: {_few(pin(outputs, name, is_pinned=is_pinned))}")
    if options.pin is not None or options.unpin is not None:
        return 0
    require_outputs(outputs)
    older_than_s = _seconds(options.older_than)
    jobs = jobs_at_work(outputs)
    found = find(
        outputs, jobs, older_than_s=older_than_s,
        keeps_checkpoints=options.keep_checkpoints, takes_caches=options.caches,
    )  # fmt: skip
    console = new_console()
    _show(console, "goes", [(each, each.why) for each in found.going])
    _show(console, "stays", found.staying)
    trash_bytes = sum(measured(path).size_bytes for path in in_trash(outputs))
    if not options.delete:
        if found.going or trash_bytes:
            trash = f" ({format_bytes(trash_bytes)} is in the trash)" if trash_bytes else ""
            print(f"{format_bytes(found.size_bytes + trash_bytes)}{trash} would be freed; --delete does it")
        else:
            print("there is nothing to remove")
        return 0
    try:
        done = take_away(outputs, found.going, jobs)
    except OSError as error:
        if not is_disk_full(error):
            raise
        make_room(outputs, found.going, jobs)
        done = take_away(outputs, found.going, jobs)
    _show(console, "stays, as it came into use", done.staying)
    _empty_trash(outputs)
    print(f"{format_bytes(done.size_bytes + trash_bytes)} freed")
    return 0


def add_rm_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip rm` takes beside `--outputs`."""
    parser.add_argument("runs", nargs="+", metavar="run", help="name of a run or sweep")
    parser.add_argument("--delete", action="store_true", help="do it; without this, say what would be done")


def rm(options: argparse.Namespace) -> int:
    """Print what goes with runs, and remove it where that is asked for."""
    outputs = options.outputs
    jobs = jobs_at_work(outputs)
    removal = removal_of(outputs, options.runs, jobs)
    console = new_console()
    _show(console, "goes", [(each, "no other run needs it") for each in removal.found.going])
    _show(console, "stays", removal.found.staying)
    folders_bytes = sum(measured(run_directory(outputs, name)).size_bytes for name in removal.names)
    size = format_bytes(folders_bytes + removal.found.size_bytes)
    names = _few(removal.names)
    if not options.delete:
        print(f"{names}: {size} would be freed; --delete does it")
        return 0
    remove_runs(outputs, options.runs, jobs)
    _empty_trash(outputs)
    print(f"removed {names}: {size} freed")
    return 0


def add_mv_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip mv` takes beside `--outputs`."""
    parser.add_argument("run", help="name of a run or sweep")
    parser.add_argument("new", help="its new name")


def mv(options: argparse.Namespace) -> int:
    """Rename it."""
    names = rename_run(options.outputs, options.run, options.new, jobs_at_work(options.outputs))
    print("\n".join(f"{old} is {new} now" for old, new in names.items()))
    return 0


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip push` takes beside `--outputs`."""
    parser.add_argument("run", help="name of a run or sweep")
    parser.add_argument("url", help="where to: s3://BUCKET/PREFIX, a directory, or any other URL of fsspec's")
    parser.add_argument("--anew", action="store_true", help="what is there too, as where a file there is damaged")


def push(options: argparse.Namespace) -> int:
    """Copy it there."""
    for record in read_runs(options.outputs, options.run):
        remote.push(options.outputs, record.name, options.url, print, is_anew=options.anew)
    return 0


def add_pull_options(parser: argparse.ArgumentParser) -> None:
    """What `unclip pull` takes beside `--outputs`."""
    parser.add_argument("run", help="name of a run or sweep that was pushed")
    parser.add_argument("url", help="where it was pushed to")


def pull(options: argparse.Namespace) -> int:
    """Fetch it."""
    for name in remote.runs_at(options.url, options.run):
        remote.pull(options.outputs, name, options.url, print)
    return 0


def _few(names: Sequence[str]) -> str:
    """The first of them, and how many there are more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _show(console: Console, title: str, found: Sequence[tuple[Removable, str]]) -> None:
    """A table, the largest first."""
    if not found:
        return
    table = new_table(title, "what", "stage", "fingerprint", "size", "age", "why")
    by_size = sorted(found, key=lambda each: -each[0].space.size_bytes)
    for each, why in by_size[:_SHOWN]:
        stage, fingerprint = each.key or ("", "")
        size = format_bytes(each.space.size_bytes)
        table.add_row(each.kind.value, stage, fingerprint[:12], size, _age(each.age_s), why)
    rest = by_size[_SHOWN:]
    if rest:
        size = format_bytes(sum(each.space.size_bytes for each, _ in rest))
        table.add_row(f"{len(rest)} smaller ones", "", "", size, "", "")
    console.print(table)


def _empty_trash(outputs: Path) -> None:
    left = empty_trash(outputs)
    if left:
        raise UserError(f"{left[0]} cannot be deleted ({len(left)} in all); ask whose it is, or delete it by hand")


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([mhdw])", age)
    if match is None:
        raise UserError(f"--older-than {age}: no age; write 4w, 30d, 12h, 90m or 0m")
    return int(match[1]) * _SECONDS[match[2]]


def _age(seconds: float) -> str:
    """In the largest unit that is not more than it."""
    unit = next((unit for unit in ("d", "h") if seconds >= _SECONDS[unit]), "m")
    return f"{seconds / _SECONDS[unit]:.0f} {unit}"
