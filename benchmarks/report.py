"""How long `unclip compare --output` takes for many runs, of which each has stages of its own.

    python benchmarks/report.py --runs 100 --rows 1000 --captions 16 --every-stage

Takes one finished run of `experiment=smoke`, makes it first, and multiplies what is each run's own: its record, its
decoder with so many rows and its evaluation, or every stage, each that was trained with so many rows. Prints the
seconds of the whole command, those of the processor, the size of what was read and that of the file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from pipeline.picture_grid import GridLayout, save_grid
from pipeline.workflow.artifacts import MANIFEST
from pipeline.workflow.runs import read_run, run_directory

OWN = ("decoder", "evaluate", "export")
CELL = 128
ROWS_PER_VALIDATION = 100


def main() -> None:
    """Make the runs and time the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--every-stage", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        outputs = Path(directory)
        _unclip("run", "experiment=smoke", "run.name=seed", "tracking=none", f"paths.outputs={outputs}")
        for number in range(options.runs):
            _multiply(outputs, number, options)
        report = outputs / "report.html"
        read_mb = sum(path.stat().st_size for path in outputs.glob("artifacts/*/*/metrics.jsonl")) / 1e6
        started, used = time.perf_counter(), _processor_s()
        _unclip("compare", "sweep:many", "--outputs", str(outputs), "--output", str(report))
        seconds, busy = time.perf_counter() - started, _processor_s() - used
        size_mb = report.stat().st_size / 1e6
        cost = f"{seconds:.1f} s ({busy:.1f} s of a processor)"
        print(f"{options.runs} runs: {cost}, {read_mb:.0f} MB of rows, a file of {size_mb:.1f} MB")


def _unclip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def _processor_s() -> float:
    """Seconds of processors that finished commands took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _multiply(outputs: Path, number: int, options: argparse.Namespace) -> None:
    """One more run: the seed's, with own stages under fingerprints of their own."""
    record = read_run(outputs, "seed").model_dump(mode="json")
    name = f"many.{number}"
    record |= {"name": name, "group": "many", "overrides": [f"stage.decoder.clip_loss.weight={number / 100}"]}
    record["config"]["stage"]["decoder"]["clip_loss"]["weight"] = number / 100
    for stage in record["stages"]:
        if options.every_stage or stage["name"] in OWN:
            old = outputs / "artifacts" / stage["name"] / stage["fingerprint"]
            stage["fingerprint"] = f"{number:08x}{stage['fingerprint'][8:]}"
            _copy_artifact(old, old.parent / stage["fingerprint"], number, options)
    directory = run_directory(outputs, name)
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _copy_artifact(old: Path, new: Path, number: int, options: argparse.Namespace) -> None:
    new.mkdir()
    manifest = json.loads((old / MANIFEST).read_text(encoding="utf-8"))
    manifest["metrics"] = {key: value + number / 1000 for key, value in manifest["metrics"].items()}
    (new / MANIFEST).write_text(json.dumps(manifest | {"fingerprint": new.name}), encoding="utf-8")
    rows = (old / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if (old / "metrics.jsonl").exists() else []
    if len(rows) > 1:
        training, validation = map(json.loads, rows[-2:])
        with (new / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for place in range(1, options.rows + 1):
                row = training if place % ROWS_PER_VALIDATION else validation
                values = {key: value + 1 / place for key, value in row.items() if isinstance(value, float)}
                place_in_time = {"samples_seen": 32 * place, "system/elapsed_s": place * 1.5}
                file.write(json.dumps(values | place_in_time) + "\n")
    for picture in old.glob("*.png"):
        _enlarge_grid(picture, new / picture.name, number, options.captions)


def _enlarge_grid(old: Path, new: Path, number: int, captions: int) -> None:
    """A grid of so many captions from a small one's pictures, which differ a little from run to run."""
    with Image.open(old) as image:
        source = image.convert("RGB").rotate(number % 7)
    names = ("real", "sample")
    grid = Image.new("RGB", (CELL * len(names), CELL * captions))
    boxes = []
    for row in range(captions):
        box = [(CELL * place, CELL * row, CELL * (place + 1), CELL * (row + 1)) for place in range(len(names))]
        for place, each in enumerate(box):
            grid.paste(source.crop((16 * place + row, 16, 16 * place + row + CELL, 16 + CELL)), each[:2])
        boxes.append(tuple(box))
    texts = tuple(f"caption {row}" for row in range(captions))
    layout = GridLayout(captions=texts, seeds=(), pictures=names, sizes=(64, 64), boxes=tuple(boxes))
    save_grid(grid, layout, new)


if __name__ == "__main__":
    main()
