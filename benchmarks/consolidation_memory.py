"""Host memory that it takes to put the averaged weights of a sharded network together and write them.

    python benchmarks/consolidation_memory.py --millions 200

Trains a network of that size for two steps on two processes under each strategy. Reported is the peak of each process
while its weights are gathered and published, above what it had when training ended, in copies of the weights.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from safetensors.torch import save_file  # noqa: E402

from pipeline.config import StrategyName  # noqa: E402
from pipeline.data.dataset import CaptionedImages  # noqa: E402
from pipeline.launch.identity import this_process  # noqa: E402
from pipeline.training.context import StageContext, StageResult  # noqa: E402
from pipeline.training.fit import fit  # noqa: E402
from pipeline.training.stage import run_stage  # noqa: E402
from pipeline.training.strategies.portable import PortableStrategy  # noqa: E402
from pipeline.workflow.declaration import Catalog, Input, StageDeclaration  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.ranks import log_of, run_on_ranks  # noqa: E402

PARAMETERS = "UNCLIP_BENCHMARK_PARAMETERS"
LAYERS = 16


def learn(context: StageContext) -> StageResult:
    """Train the large network; say what gathering and writing its weights took."""
    settings = context.settings_as(tiny.LearnerSettings)
    images = CaptionedImages(context.input("data").path, tiny.SIZE, context.frozen.trainer.cache_mib)
    width = int((int(os.environ[PARAMETERS]) / LAYERS) ** 0.5)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.GELU())]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIZE**2, width), *layers, nn.Linear(width, 3))
    copy_bytes = sum(4 * each.numel() for each in network.parameters())
    module = tiny.LearnerModule(network, settings, context)
    with _measured_gathering(copy_bytes):
        result = fit(context, module, images)
    if context.is_first_process:
        with _peak("written", copy_bytes):
            save_file(network.state_dict(), context.output / "weights.safetensors")
    return StageResult({}, result.metrics, result.samples_seen)


@contextmanager
def _measured_gathering(copy_bytes: int) -> Iterator[None]:
    classes = [each for each in _subclasses(PortableStrategy) if "leave_averaged_weights" in vars(each)]
    originals = [each.leave_averaged_weights for each in classes]
    for each, original in zip(classes, originals, strict=True):

        def measured(self: PortableStrategy, original=original) -> None:  # noqa: ANN001
            with _peak("gathered", copy_bytes):
                original(self)

        each.leave_averaged_weights = measured
    yield
    for each, original in zip(classes, originals, strict=True):
        each.leave_averaged_weights = original


def _subclasses(of: type) -> set[type]:
    import pipeline.training.strategies.zero  # noqa: F401 - for its strategy

    return {of, *(each for direct in of.__subclasses__() for each in _subclasses(direct))}


@contextmanager
def _peak(what: str, copy_bytes: int) -> Iterator[None]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kib("VmRSS")
    yield
    copies = (_kib("VmHWM") - before) * 1024 / copy_bytes
    print(f"MEASURED {what} by process {this_process().rank}: {copies:.2f} copies", flush=True)


def _kib(field: str) -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field)]
    return int(line.split()[1])


CATALOG = Catalog(
    {
        **tiny.CATALOG.stages,
        "learner": StageDeclaration(
            version=1,
            settings=tiny.LearnerSettings,
            run="consolidation_memory:learn",
            output="learner",
            inputs=(Input("data"),),
        ),
    },
    lambda _stages: None,
)


def main() -> None:
    """Measure each strategy in processes of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=200)
    options = parser.parse_args()
    os.environ[PARAMETERS] = str(options.millions * 10**6)
    os.environ["PYTHONPATH"] = str(ROOT / "benchmarks")
    torch.set_num_threads(1)
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        with tempfile.TemporaryDirectory() as place:
            stage = tiny.frozen(
                Path(place), devices=2, strategy=StrategyName(strategy), max_samples=16, checkpoint_every_samples=None
            ).model_copy(update={"catalog": "consolidation_memory:CATALOG"})
            run_stage(tiny.data_of(stage), Event())
            if any(run_on_ranks([stage], timeout_s=900)):
                sys.exit(log_of(stage))
            measured = [line for line in log_of(stage).splitlines() if line.startswith("MEASURED")]
            print(
                f"{strategy}:", *sorted(line.removeprefix("MEASURED ") for line in measured), sep="\n    ", flush=True
            )


if __name__ == "__main__":
    main()
