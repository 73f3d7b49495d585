"""Every training stage under every strategy on one CUDA GPU in bf16: memory and throughput, as a table.

    python benchmarks/strategies_on_a_gpu.py --size small --steps 60 --batch-size 64

Each line is a process of its own. Memory is the peak of what torch allocated on the device while the stage trained,
throughput the median of the rows after a warm-up. With --size small the networks have 27 to 110 million parameters (the
judge's is one tiny network at each size); with demo they are the demo's, with tiny the tests'. Without a GPU the same
runs on the CPU, where memory is the process's resident set. On one device nothing is sharded: what is seen of ZeRO are
its own copies and buffers, and what offload takes off the device.
"""

import argparse
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from stage_runs import STAGES, TINY, Bench, finished, run_or_exit

from tests.support.tiny_runs import rows_of

STRATEGIES = ("ddp", "zero2", "zero2_offload", "zero3", "zero3_offload")
WARM_UP_ROWS = 3
STEPS_PER_ROW = 4

_COMMON = ("experiment=smoke", "tracking=none", "data.samples=640", "data.shard_samples=320")
SIZES: dict[str, tuple[str, ...]] = {
    "tiny": (*TINY, "data.samples=128"),
    "demo": _COMMON,
    "small": (
        *_COMMON,
        "model/clip@stage.clip.network=small",
        "model/prior@stage.prior.network=small",
        "model/unet@stage.decoder.network=small_decoder",
        "model/unet@stage.upsampler.network=small_upsampler",
        "data.image_size=256",
        "stage.decoder.image_size=64",
        "stage.upsampler.high_size=256",
        "stage.upsampler.crop_size=64",
    ),
}


def main() -> None:
    """Train every stage by every strategy, and print a row of the table for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    if options.steps <= STEPS_PER_ROW * WARM_UP_ROWS:
        parser.error(f"--steps {options.steps} is a warm-up alone; use more than {STEPS_PER_ROW * WARM_UP_ROWS}")
    overrides = (
        "trainer.accelerator=auto",
        f"trainer.precision={options.precision}",
        "trainer.loader_workers=4",
        f"trainer.log_every_steps={STEPS_PER_ROW}",
        "trainer.cpu_threads=null",
        "trainer.cache_mib=4096",
        "trainer.validation_samples=16",
        "trainer.sample_every_samples=null",
        "trainer.checkpoint_every_min=600",
        *(f"stage.{stage}.global_batch_size={options.batch_size}" for stage in STAGES),
        *(f"stage.{stage}.max_samples={options.steps * options.batch_size}" for stage in STAGES),
    )
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), overrides, SIZES[options.size])
        bench.make_inputs()
        is_on_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if is_on_gpu else "CPU"
        memory = "peak device memory, MiB" if is_on_gpu else "resident memory, MiB"
        print(f"{device}, torch {torch.__version__}, deepspeed {version('deepspeed')}, {options.precision}, ", end="")
        print(f"batches of {options.batch_size}, {options.steps} steps, networks: {options.size}\n")
        print(f"| stage | strategy | {memory} | samples/s |\n|---|---|---|---|")
        for name in options.stages:
            for strategy in STRATEGIES:
                print(f"| {name} | {strategy} | {_measure(bench, name, strategy)} |", flush=True)


def _measure(bench: Bench, name: str, strategy: str) -> str:
    stage = bench.stage(name, strategy, strategy)
    run_or_exit([stage], processes=1)
    rows = [row for row in rows_of(finished(stage)) if "system/samples_per_s" in row]
    memory_mib = max(row["system/memory_mib"] for row in rows)
    samples_per_s = statistics.median(row["system/samples_per_s"] for row in rows[WARM_UP_ROWS:])
    return f"{memory_mib:,.0f} | {samples_per_s:,.1f}"


if __name__ == "__main__":
    main()
