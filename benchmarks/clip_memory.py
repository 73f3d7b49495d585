"""Peak memory and time of one CLIP step, whole and in pieces whose activations are computed again.

    python benchmarks/clip_memory.py --batch 4096 --pieces 4096 1024 256 64

Each setting runs in a process of its own, on the CPU and the demo's CLIP; memory is that process's peak above what it
had before the first step.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from pipeline.compose import compose_members
from pipeline.config import validate
from pipeline.data.batch import ImageBatch
from stages.clip.network import ClipModel, contrastive_loss
from stages.clip.settings import ClipSettings
from stages.clip.train import ClipModule


def main() -> None:
    """Measure each setting in its own process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--pieces", type=int, nargs="+", default=[4096, 1024, 256, 64])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        _measure(options.batch, options.measure)
        return
    print(f"| pieces of a batch of {options.batch:,} | peak memory, MiB | seconds per step |\n|---|---|---|")
    for piece in options.pieces:
        command = [sys.executable, __file__, "--batch", str(options.batch), "--measure", str(piece)]
        subprocess.run(command, check=True)


def _measure(batch_size: int, piece: int) -> None:
    torch.set_num_threads(2)
    (member,) = compose_members("benchmark", [])
    values = {name: value for name, value in member.config.stage["clip"].items() if name not in ("kind", "trainer")}
    settings = validate(ClipSettings, values)
    module = ClipModule(ClipModel(settings.network, settings.loss), settings)
    module.micro_batch_size = piece
    size = settings.network.image_size
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    captions = tuple(f"a small red circle at the left of a gray background {number}" for number in range(batch_size))
    tokens = module.network.tokenize(captions)
    batch = ImageBatch(images, captions, torch.arange(batch_size), torch.arange(batch_size), tokens=tokens)
    objective = contrastive_loss(settings.loss, 0, 1)
    before = _peak_kib()
    times = []
    for _ in range(3):
        started = time.monotonic()
        module.zero_grad()
        objective(*module._embed(batch), module.network.logit_scale, module.network.logit_bias).backward()
        times.append(time.monotonic() - started)
    print(f"| {piece:,} | {(_peak_kib() - before) / 1024:,.0f} | {sorted(times)[1]:.1f} |", flush=True)


def _peak_kib() -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1])


if __name__ == "__main__":
    main()
