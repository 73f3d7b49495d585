"""`unclip evaluate RUN ...`: the metrics of finished runs, on their own held-out data or on other shards."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.options import OptionParser, command_parser
from pipeline.report.evaluations import evaluations_directory, new_evaluation
from pipeline.report.metrics import finite, format_interval, is_bound
from pipeline.terminal.tables import new_console
from pipeline.workflow.sealed import write_json_atomically
from stages.evaluate.request import SECTIONS, Request, given_shards, read_request
from stages.evaluate.settings import METRICS, encoder_digests
from stages.evaluate.sweep import SWEEPS, plot_sweep


def main(arguments: Sequence[str]) -> int:
    """Check all that is asked for, then measure one run after the other; write and show what is found."""
    options = _parser().parse_intermixed_args(arguments)
    for name in ("samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is none; give 1 or more")
    shards = given_shards(options)
    requests = [read_request(options, name, shards) for name in dict.fromkeys(options.runs)]
    for request in requests:
        evaluations_directory(options.outputs, request.name)
    from stages.evaluate.measure import held_out, measure  # with torch, which a refusal does not wait for

    console = new_console()
    found: dict[str, dict[str, float]] = {}
    with held_out(shards) as given, Console(stderr=True).status("") as status:
        for request in requests:
            points = measure(
                request, request.data or given, lambda text, run=request.name: status.update(f"{run}: {text}")
            )
            written = _write(options, request, points)
            console.print(f"written: {written}", soft_wrap=True, markup=False)
            found |= {f"{request.name} {value}".strip(): metrics for value, metrics in points.items()}
    console.print(_table(found))
    return 0


def _parser() -> OptionParser:
    parser = command_parser("evaluate", "Metrics of finished runs, on data that they never trained on.")
    parser.add_argument("runs", nargs="+", metavar="run", help="name of a finished run")
    parser.add_argument(
        "--metrics", metavar="A,B", help=f"of {', '.join([*METRICS, *SECTIONS])}; fid@judge_clip: in that encoder"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="pictures to make, and pairs to look at")
    parser.add_argument("--batch-size", type=int, metavar="N", help="so many at a time")
    parser.add_argument(
        "--data", action="append", metavar="SHARDS", help="indexed shards instead of the run's own data"
    )
    parser.add_argument("--caption", default="txt", help="where those have captions: an extension, or json:FIELD")
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="FID's Inception (default: in torch.hub's cache)"
    )
    parser.add_argument("--dinov2", type=Path, metavar="DIR", help="a DINOv2 as transformers saves it")
    parser.add_argument("--open-clip", type=Path, metavar="PATH", help="a CLIP of open_clip's: its directory or file")
    parser.add_argument("--open-clip-model", metavar="NAME", help="which of open_clip's models a file is of")
    parser.add_argument("--classes", type=Path, metavar="DIR", help="a directory of pictures for each class")
    parser.add_argument("--sweep", metavar="NAME=1,2,4", help=f"a curve over one of {', '.join(SWEEPS)}")
    return parser


def _write(options: argparse.Namespace, request: Request, points: Mapping[str, Mapping[str, float]]) -> Path:
    """Write the record of an evaluation, and beside it a sweep's plot; return where it is."""
    path = new_evaluation(
        evaluations_directory(options.outputs, request.name), request.sweep.name if request.sweep else ""
    )
    prepared = request.of_kind("prepare")
    own_data = f"validation pictures of prepare/{prepared.manifest.fingerprint[:12]}" if prepared else None
    record: dict[str, Any] = {
        "run": request.name,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": {each.manifest.stage: each.manifest.fingerprint for each in request.artifacts},
        "data": options.data or own_data,
        "settings": request.settings.model_dump(mode="json"),
        "sections": request.sections,
        "encoders": encoder_digests(request.settings.encoders, request.settings.encoders_of_files),
        "points": {value: {name: finite(each) for name, each in found.items()} for value, found in points.items()},
    }
    if request.sweep is not None:
        record["plot"] = path.with_suffix(".png").name
        plot_sweep(request.sweep, list(points.values()), request.name, path.with_suffix(".png"))
    write_json_atomically(path, record)
    return path


def _table(found: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table()
    table.add_column("metric", overflow="fold")
    for name in found:
        table.add_column(name, justify="right", overflow="fold")
    names = dict.fromkeys(name for metrics in found.values() for name in metrics if not is_bound(name, metrics))
    for name in names:
        table.add_row(name, *(format_interval(metrics, name) for metrics in found.values()))
    return table
