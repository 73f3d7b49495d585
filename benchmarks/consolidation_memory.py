"""Host memory that it takes to put the averaged weights of a sharded network together and write them.

    python benchmarks/consolidation_memory.py --millions 200

Trains a network of that size for two steps on two processes under each strategy. Reported is the peak of each process
from the end of training until its weights are written, above what it had before, in copies of the weights.
"""

import argparse
import ctypes
import gc
import os
import tempfile
from pathlib import Path
from threading import Event

import torch
from stage_runs import ROOT, run_or_exit
from torch import nn

from pipeline.config import StrategyName
from pipeline.training.context import StageContext, StageResult
from pipeline.training.fit import fit
from pipeline.training.stage import run_stage
from pipeline.workflow.declaration import Catalog, Input, StageDeclaration
from tests.support import tiny
from tests.support.ranks import log_of

PARAMETERS = "UNCLIP_BENCHMARK_PARAMETERS"
LAYERS = 16


class Learner(tiny.LearnerModule):
    """Has the peak begin anew when training has ended."""

    def on_fit_end(self) -> None:
        """Note what is in use."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not to be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
        self.before_kib = _kib("VmRSS")


def learn(context: StageContext) -> StageResult:
    """Train the large network; say what gathering and writing its weights took."""
    width = int((int(os.environ[PARAMETERS]) / LAYERS) ** 0.5)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.GELU())]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIZE**2, width), *layers, nn.Linear(width, 3))
    copy_kib = sum(4 * each.numel() for each in network.parameters()) / 1024
    module = Learner(network, context.settings_as(tiny.LearnerSettings), context)
    result = fit(context, module, context.images(tiny.SIZE))
    context.save(network)
    copies = (_kib("VmHWM") - module.before_kib) / copy_kib
    print(f"MEASURED process {context.process.rank}: {copies:.2f} copies", flush=True)
    return StageResult(metrics=result.metrics, samples_seen=result.samples_seen)


def _kib(field: str) -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field)]
    return int(line.split()[1])


LEARNER = StageDeclaration(1, tiny.LearnerSettings, "consolidation_memory:learn", "learner", (Input("data"),))
CATALOG = Catalog({**tiny.CATALOG.stages, "learner": LEARNER})


def main() -> None:
    """Measure each strategy in processes of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=200)
    options = parser.parse_args()
    os.environ |= {PARAMETERS: str(options.millions * 10**6), "PYTHONPATH": str(ROOT / "benchmarks")}
    torch.set_num_threads(1)
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        with tempfile.TemporaryDirectory() as place:
            stage = tiny.frozen(
                Path(place), devices=2, strategy=StrategyName(strategy), max_samples=16, checkpoint_every_samples=None
            ).model_copy(update={"catalog": "consolidation_memory:CATALOG"})
            run_stage(tiny.data_of(stage), Event())
            run_or_exit([stage], processes=2)
            measured = [line for line in log_of(stage).splitlines() if line.startswith("MEASURED")]
            print(strategy, *sorted(measured), sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
