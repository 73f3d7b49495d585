"""Training steps of every stage beside bare loops over the same network and beside other projects' trainers.

    python benchmarks/steps.py --device cuda --sizes emoji,vit,paper

For each stage and size: the real stage (`pipeline.training.fit`, loader included), the plain loop, the same compiled,
and the peer: open_clip's own training step for CLIP, dalle2-pytorch's trainers for prior and decoder. Each has a
process of its own, which is ended when it has been seen for long enough: nothing is validated or saved. They take
turns, in rounds, and ratios are medians over these. On a GPU each turn is a new process, so that it has the memory for
itself. On a CPU the others stand still, and rates are by processor time, so that other work on the machine counts less;
memory is the resident set's peak. Sampling is set beside diffusers' pipeline on the exported model. `--set` changes
what all have in common, `--ours` adds rows of the real stage:

    python benchmarks/steps.py --stages clip --loops ours --ours trainer=zero2 trainer=zero3_offload

What was seen is also in `steps.json` in the output directory, where inputs are kept for the next call.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from stage_runs import run_or_exit  # noqa: E402
from step_loops import SAMPLED, Loop, Request, Row, peak_rss_mib  # noqa: E402
from step_peers import PEERS, run_loop  # noqa: E402

from pipeline.config import Precision  # noqa: E402
from pipeline.training import worker  # noqa: E402
from pipeline.training.measurements import Measurements, device_peak_flops  # noqa: E402
from pipeline.workflow.frozen import FrozenStage, write_frozen  # noqa: E402
from pipeline.workflow.progress import read_failure  # noqa: E402
from pipeline.workflow.record import MEASURED, read_standing  # noqa: E402
from tests.support.ranks import free_port  # noqa: E402
from tests.support.tiny_runs import needed, plan_stages  # noqa: E402

OURS = "ours"
SAMPLING = "sampling"
PROCESSOR_S = f"{MEASURED}processor_s"
STEPS_PER_ROW = 20
ENDLESS = 10**9
HEADER = """\
| size, stage | batch | loop | parameters, M | samples/s | TFLOP/s | MFU | MiB | data wait | time / plain | / compiled |
|---|---|---|---|---|---|---|---|---|---|---|"""
SHARD_SAMPLES = 256
WORDS = ["a", "red", "blue", "small", "dog", "cat", "tree", "house", "river", "on", "under", "with", "two", "stands"]
Rows = Generator[Row, None, None]


@dataclass(frozen=True)
class Size:
    """Overrides of the config, and the stages to measure with the batch that each has."""

    overrides: tuple[str, ...]
    batches: dict[str, int]
    picture_size: int | None = None  # of JPEGs in shards; None: the scenes of the demo
    samples_too: bool = False


def _vit(patch: int, width: int, layers: int, text_width: int) -> tuple[str, ...]:
    tower = {
        "embed_dim": text_width, "image_size": 224, "patch_size": patch, "vision_width": width, "vision_layers": layers,
        "vision_heads": width // 64, "text_width": text_width, "text_layers": 12, "text_heads": text_width // 64,
        "context_length": 77,
    }  # fmt: skip
    return (
        "experiment=emoji",
        "~data.image_size",
        "trainer.cache_mib=0",
        *(f"stage.clip.network.{k}={v}" for k, v in tower.items()),
    )


SIZES = {
    "demo": Size(
        ("data.samples=1024", "data.unseen_samples=64", "data.shard_samples=512"),
        {"clip": 256, "prior": 128, "decoder": 32, "upsampler": 8},
        samples_too=True,
    ),
    "emoji": Size(
        ("experiment=emoji", "~data.image_size"),
        {"clip": 2048, "prior": 1024, "decoder": 256, "upsampler": 128},
        picture_size=256,
        samples_too=True,
    ),
    "vit_b_32": Size(_vit(32, 768, 12, 512), {"clip": 1024}, picture_size=256),
    "vit_b_16": Size(_vit(16, 768, 12, 512), {"clip": 512}, picture_size=256),
    "vit_l_14": Size(_vit(14, 1024, 24, 768), {"clip": 192}, picture_size=256),
    "paper": Size(
        ("experiment=paper", "trainer.cache_mib=0"),
        {"clip": 64, "prior": 256, "decoder": 16, "upsampler_1": 64, "upsampler_2": 16},
        picture_size=1024,
    ),
}


def main() -> None:
    """Measure, and print a row of the table as soon as it is known."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what ends the other processes
    on_gpu = options.device == "cuda"
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} thread(s), by processor time"
    print(f"{name}, torch {torch.__version__}, {options.rounds} rounds of {STEPS_PER_ROW} steps\n")
    print(HEADER)
    seen = []
    for size in (each for asked in options.sizes for each in SIZES if each.startswith(asked)):
        for stage in [*SIZES[size].batches, *([SAMPLING] if SIZES[size].samples_too else [])]:
            if options.stages is None or stage in options.stages:
                seen.append(Comparison(options, size, stage).measure())
                (options.output / "steps.json").write_text(json.dumps(seen, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu, several = torch.cuda.is_available(), {"type": lambda given: given.split(",")}
    loops = [OURS, *(each.name.lower() for each in Loop)]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--sizes", **several, default=[*SIZES] if on_gpu else ["demo"], help="or the beginning of some")
    parser.add_argument("--stages", **several, help="such as clip,upsampler_1,sampling (default: all)")
    parser.add_argument("--loops", **several, default=loops, help=f"of {','.join(loops)}")
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="a row of the real stage with each")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all rows")
    parser.add_argument("--rounds", type=int, default=3, help=f"of {STEPS_PER_ROW} steps of each")
    parser.add_argument("--batch-divisor", type=int, default=1, help="divides all batches, for a device with less room")
    parser.add_argument("--workers", type=int, default=8 if on_gpu else 0, help="processes that read pictures")
    parser.add_argument("--threads", type=int, default=os.cpu_count() if on_gpu else 1)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "steps")
    return parser


@dataclass(frozen=True)
class Comparison:
    """One stage at one size."""

    options: argparse.Namespace
    size: str
    stage: str

    def measure(self) -> dict[str, object]:
        """Let all take turns; print their rows and give back all that was seen."""
        turns, rounds = dict(self._turns()), []
        if self.options.device == "cpu":
            # All are in memory, and stand still while another one has its turn.
            with ExitStack() as until_the_end:
                runs = {name: until_the_end.enter_context(closing(start())) for name, start in turns.items()}
                for run in runs.values():
                    next(run)
                rounds = [{name: next(run) for name, run in runs.items()} for _ in range(self.options.rounds)]
        else:
            rounds = [{name: _second(start()) for name, start in turns.items()} for _ in range(self.options.rounds)]
        for name in turns:
            print(self._row(name, [each[name] for each in rounds], rounds), flush=True)
        kept = [{name: asdict(each) for name, each in every.items()} for every in rounds]
        return {"size": self.size, "stage": self.stage, "batch": self._batch, "rounds": kept}

    @property
    def _batch(self) -> int:
        if self.stage == SAMPLING:
            return SAMPLED
        return max(1, SIZES[self.size].batches[self.stage] // self.options.batch_divisor)

    def _turns(self) -> Iterator[tuple[str, Callable[[], Rows]]]:
        frozen, loops = self._frozen(), [each for each in Loop if each.name.lower() in self.options.loops]
        trained = (Loop.PLAIN, Loop.COMPILED, *([Loop.PEER] if frozen.kind in PEERS else []))
        if self.stage != SAMPLING:
            names = {OURS: frozen} if OURS in self.options.loops else {}
            names |= {f"{OURS}, {each}": self._frozen(*each.split()) for each in self.options.ours}
            for number, (name, each) in enumerate(names.items()):
                yield name, partial(self._ours, each, frozen.outputs / f"{self.stage}-{number}")
        for loop in loops:
            if loop in ((Loop.SAMPLE, Loop.STOCK) if self.stage == SAMPLING else trained):
                yield loop.value, partial(self._loop, frozen, loop)

    def _frozen(self, *more: str) -> FrozenStage:
        """The stage, whose inputs are made where they are not there yet."""
        options, size = self.options, SIZES[self.size]
        batches = {name: max(1, each // options.batch_divisor) for name, each in size.batches.items()}
        overrides = [
            *size.overrides, "tracking=none", f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}",
            f"trainer.loader_workers={options.workers}", f"trainer.cpu_threads={options.threads}",
            f"trainer.log_every_steps={STEPS_PER_ROW}", "trainer.validation_samples=8",
            "trainer.sample_every_samples=null", "trainer.checkpoint_every_min=600",
        ]  # fmt: skip
        for name, batch in batches.items():
            steps = ENDLESS if name == self.stage else 1
            overrides += [f"stage.{name}.global_batch_size={batch}", f"stage.{name}.max_samples={batch * steps}"]
        if size.picture_size is not None:
            overrides += ["data=webdataset", "data.validation_fraction=0.1", "stage.judge_clip.global_batch_size=8"]
            overrides += [f"data.shards={_shards(options.output, size.picture_size, 3 * max(batches.values()))}"]
        place, target = options.output / self.size, "export" if self.stage == SAMPLING else self.stage
        stages = plan_stages(place, *overrides, *options.set, *more, base=())
        made = [each for each in needed(stages, target) if target == "export" or each.stage != target]
        missing = [each for each in made if each.store.find(each.stage, each.fingerprint) is None]
        if missing:
            run_or_exit(missing, processes=1)
        return stages[target]

    def _ours(self, frozen: FrozenStage, place: Path) -> Rows:
        """What the real stage logs below `place`, from its second row on."""
        shutil.rmtree(place, ignore_errors=True)
        (place / "artifacts").mkdir(parents=True)
        for name in {name for name, _ in frozen.needs}:
            (place / "artifacts" / name).symlink_to(frozen.outputs / "artifacts" / name)
        frozen, seen = frozen.model_copy(update={"outputs": place}), 1
        with self._process(_real_stage, write_frozen(frozen).path) as process:
            while process.is_alive():
                time.sleep(0.02)
                rows = [each for each in read_standing(frozen.work) if PROCESSOR_S in each]
                if len(rows) > seen:
                    seen = len(rows)
                    yield from self._turn(process, self._logged(process, rows))
            failure = read_failure(frozen.work)
            yield from repeat(Row(instead=failure.message if failure else f"ended with status {process.exitcode}"))

    def _logged(self, process: BaseProcess, rows: list[dict[str, float]]) -> Row:
        names = ("samples_per_s", "memory_mib", "data_wait_share", "mfu")
        rate, memory_mib, waited, mfu = (rows[-1].get(MEASURED + name) for name in names)
        if self.options.device == "cpu":
            rate = self._batch * STEPS_PER_ROW / (rows[-1][PROCESSOR_S] - rows[-2][PROCESSOR_S])
            memory_mib = peak_rss_mib(process.pid or 0)
            waited = rows[1][f"{MEASURED}data_wait_share"]  # during the later ones this process stood still
        return Row(rate or 0.0, memory_mib or 0.0, data_wait_share=waited, mfu=mfu)

    def _loop(self, frozen: FrozenStage, loop: Loop) -> Rows:
        """The rows of a loop of `step_loops.py`."""
        steps, instead = 1 if self.stage == SAMPLING else STEPS_PER_ROW, None
        request = Request(write_frozen(frozen).path, loop, self.options.device, self.options.threads, steps)
        receiver, sender = self._processes.Pipe(duplex=False)
        with self._process(run_loop, request, sender) as process:
            while instead is None and (receiver.poll(1) or process.is_alive()):
                if receiver.poll():
                    row = receiver.recv()
                    instead = row.instead
                    yield from self._turn(process, row)
            yield from repeat(Row(instead=instead or f"ended with status {process.exitcode}"))

    @property
    def _processes(self) -> Any:
        """On a CPU they begin with what this one has imported, which costs more than what is measured."""
        return get_context("fork" if self.options.device == "cpu" else "spawn")

    @contextmanager
    def _process(self, run: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
        """A process with a group of its own, which is ended with all that it started."""
        process = self._processes.Process(target=run, args=arguments)
        process.start()
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def _turn(self, process: BaseProcess, row: Row) -> Rows:
        """Hand a row out. On a CPU the process stands still until the next one is wanted."""
        with suppress(ProcessLookupError):  # it may have ended
            if self.options.device == "cpu":
                os.killpg(process.pid or 0, signal.SIGSTOP)
            yield row
            if self.options.device == "cpu":
                os.killpg(process.pid or 0, signal.SIGCONT)

    def _row(self, name: str, seen: list[Row], rounds: list[dict[str, Row]]) -> str:
        head = f"| {self.size}, {self.stage} | {self._batch} | {name} |"
        if any(each.instead for each in seen):
            return f"{head} {next(each.instead for each in seen if each.instead)} | | | | | | |"
        rate, first, last = median(each.samples_per_s for each in seen), seen[0], seen[-1]
        # The real stage does the work of the plain loop, and nothing counts where a graph is compiled.
        flops = first.flops_per_sample or rounds[0].get(Loop.PLAIN, Row()).flops_per_sample
        peak = device_peak_flops(torch.device(self.options.device), Precision.BFLOAT16_MIXED)
        mfu = last.mfu or (rate * flops / peak if flops and peak else None)
        bases = (Loop.STOCK, Loop.STOCK) if self.stage == SAMPLING else (Loop.PLAIN, Loop.COMPILED)
        paired = [[each.get(base, Row()).samples_per_s / each[name].samples_per_s for each in rounds] for base in bases]
        cells = [
            f"{first.parameters / 1e6:,.1f}" if first.parameters else "",
            f"{rate:,.4g}",
            f"{rate * flops / 1e12:,.3g}" if flops else "",
            f"{mfu:.1%}" if mfu else "",
            f"{median(each.memory_mib for each in seen):,.0f}",
            f"{last.data_wait_share:.1%}" if last.data_wait_share is not None else "",
            *(f"{median(ratios):.2f}" if all(ratios) else "" for ratios in paired),
        ]
        return f"{head} {' | '.join(cells)} |"


def _second(run: Rows) -> Row:
    with closing(run):
        next(run)
        return next(run)


def _real_stage(frozen: Path) -> None:
    """Be the process of a real stage, whose rows have the time of the processor besides."""
    os.setsid()
    take = Measurements.take
    Measurements.take = lambda *given: take(*given) | {PROCESSOR_S: time.process_time()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0", "NODE_RANK": "0"}
    sys.argv = ["worker", str(frozen)]
    sys.exit(worker.main())


def _shards(place: Path, picture_size: int, samples: int) -> Path:
    """Indexed shards of JPEGs that cost as much to decode as photographs, with captions of common words; made once."""
    directory, numbers = place / f"shards-{picture_size}", np.random.default_rng(0)
    paths = [directory / f"{shard:05}.tar" for shard in range(-(-samples // SHARD_SAMPLES))]
    if all(path.exists() for path in paths):
        return directory
    directory.mkdir(exist_ok=True)
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for sample in range(SHARD_SAMPLES):
                coarse = numbers.integers(0, 256, (picture_size // 8, picture_size // 8, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((picture_size, picture_size), Image.Resampling.BICUBIC)
                picture.save(content := io.BytesIO(), "JPEG", quality=90)
                caption = " ".join(numbers.choice(WORDS, size=numbers.integers(6, 20)))
                for extension, each in (("jpg", content.getvalue()), ("txt", caption.encode())):
                    header = tarfile.TarInfo(f"{path.stem}{sample:04}.{extension}")
                    header.size = len(each)
                    tar.addfile(header, io.BytesIO(each))
    subprocess.run([sys.executable, "-m", "pipeline.cli", "shards", "index", str(directory)], cwd=ROOT, check=True)
    return directory


if __name__ == "__main__":
    main()
