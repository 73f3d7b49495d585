"""Every training stage under every strategy on two processes of this machine: what is equal to what, as a table.

    python benchmarks/strategies.py --precision bf16-mixed --stages clip decoder

Each cell is how far the published weights are from others, relative to the way that training moved them (Euclidean
distances), or "bits" where there is no difference at all: from the same stage under DDP; from itself, where a run goes
on from the checkpoint half way; from DDP where it goes on from DDP's checkpoint; and from DDP where one process goes on
from its checkpoint. The networks and data are the tests' tiny ones.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from stage_runs import STAGES, Bench, finished, run_or_exit

from pipeline.workflow.frozen import FrozenStage

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
HALF = "samples-000000000024"


def half_done(bench: Bench, name: str, source: FrozenStage, run: str, strategy: str, devices: int = 2) -> FrozenStage:
    """A stage that another one left half done."""
    stage = bench.stage(name, run, strategy, devices)
    target = stage.work / "checkpoints"
    target.mkdir(parents=True)
    shutil.copytree(source.work / "checkpoints" / f"{HALF}.ckpt", target / f"{HALF}.ckpt")
    shutil.copy(source.work / "checkpoints" / f"{HALF}.json", target)
    return stage


def main() -> None:
    """Train, resume and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    overrides = (
        f"trainer.precision={options.precision}",
        "trainer.checkpoint_every_samples=8",
        "trainer.keep_checkpoints=9",
        "trainer.drop_checkpoints=false",
        *(f"stage.{stage}.global_batch_size=8" for stage in STAGES),
        *(f"stage.{stage}.max_samples=48" for stage in STAGES),
        *(f"stage.{stage}.optimizer.gradient_clip_norm=null" for stage in STAGES),
        # In so few steps a warm-up would leave everything where it was.
        *(f"stage.{stage}.optimizer.warmup_samples=0" for stage in STAGES),
    )
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), overrides)
        bench.make_inputs()
        print("| stage | strategy | from DDP | resumed | from DDP's checkpoint | on one process |")
        print("|---|---|---|---|---|---|")
        for name in options.stages:
            _measure(bench, name)


def _measure(bench: Bench, name: str) -> None:
    whole = {each: bench.stage(name, f"whole-{each}", each, devices=2) for each in STRATEGIES}
    at_rest = replace(bench, overrides=(*bench.overrides, f"stage.{name}.optimizer.learning_rate=1e-15"))
    still = at_rest.stage(name, "still", "ddp", devices=2)
    run_or_exit([*whole.values(), still], processes=2)
    moved_by = _distance(_weights(whole["ddp"]), _weights(still))
    resumed = {each: half_done(bench, name, whole[each], f"resumed-{each}", each) for each in STRATEGIES}
    moved = {each: half_done(bench, name, whole["ddp"], f"moved-{each}", each) for each in STRATEGIES}
    run_or_exit([*resumed.values(), *moved.values()], processes=2)
    alone = {each: half_done(bench, name, whole[each], f"alone-{each}", "ddp", devices=1) for each in STRATEGIES}
    run_or_exit(list(alone.values()), processes=1)
    for each in STRATEGIES:
        cells = [
            _difference(whole[each], whole["ddp"], moved_by),
            _difference(resumed[each], whole[each], moved_by),
            _difference(moved[each], whole["ddp"], moved_by),
            _difference(alone[each], whole["ddp"], moved_by),
        ]
        print(f"| {name} | {each} | {' | '.join(cells)} |", flush=True)


def _weights(stage: FrozenStage) -> dict[str, torch.Tensor]:
    (file,) = finished(stage).path.glob("*.safetensors")
    return load_file(file)


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one) ** 0.5


def _difference(stage: FrozenStage, reference: FrozenStage, moved_by: float) -> str:
    own, expected = _weights(stage), _weights(reference)
    if all(torch.equal(own[name], expected[name]) for name in expected):
        return "bits"
    return f"{_distance(own, expected) / moved_by:.0e}"


if __name__ == "__main__":
    main()
