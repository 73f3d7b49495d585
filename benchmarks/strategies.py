"""Every training stage under every strategy on two processes of this machine: what is equal to what, as a table.

    python benchmarks/strategies.py [--precision bf16-mixed] [--stages clip decoder]

Each cell is the largest difference of a published weight, or "bits" where there is none: from the same stage under DDP;
from itself, where a run goes on from the checkpoint half way; from DDP where it goes on from DDP's checkpoint; and from
DDP where one process goes on from its checkpoint. The networks and data are the tests' tiny ones.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests" / part) for part in ("pipeline/training", "stages")]

from ranks import log_of, run_on_ranks  # noqa: E402
from tiny_runs import plan_stages, run_until  # noqa: E402

from pipeline.workflow.frozen import FrozenStage  # noqa: E402

STAGES = ("clip", "prior", "decoder", "upsampler", "judge")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
HALF = "samples-000000000024"


@dataclass(frozen=True)
class Bench:
    """Where each run has outputs of its own, and the settings that all of them have."""

    place: Path
    overrides: tuple[str, ...]

    def stage(self, name: str, run: str, strategy: str, devices: int = 2) -> FrozenStage:
        """A stage whose inputs are there and which was not begun."""
        artifacts = self.place / name / run / "artifacts"
        artifacts.mkdir(parents=True)
        for made in ("prepare", "clip", "embed"):
            if made != name:
                (artifacts / made).symlink_to(self.place / "inputs" / "artifacts" / made)
        options = [f"trainer={strategy}", f"trainer.devices={devices}"]
        return plan_stages(artifacts.parent, *self.overrides, *options)[name]

    def half_done(self, name: str, source: FrozenStage, run: str, strategy: str, devices: int = 2) -> FrozenStage:
        """A stage that another one left half done."""
        stage = self.stage(name, run, strategy, devices)
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
        *(f"stage.{stage}.global_batch_size=8" for stage in STAGES),
        *(f"stage.{stage}.max_samples=48" for stage in STAGES),
        *(f"stage.{stage}.optimizer.gradient_clip_norm=null" for stage in STAGES),
    )
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), overrides)
        run_until(bench.place / "inputs", "embed", *overrides)
        print("| stage | strategy | from DDP | resumed | from DDP's checkpoint | on one process |")
        print("|---|---|---|---|---|---|")
        for name in options.stages:
            _measure(bench, name)


def _measure(bench: Bench, name: str) -> None:
    whole = {each: bench.stage(name, f"whole-{each}", each) for each in STRATEGIES}
    _run(list(whole.values()))
    resumed = {each: bench.half_done(name, whole[each], f"resumed-{each}", each) for each in STRATEGIES}
    moved = {each: bench.half_done(name, whole["ddp"], f"moved-{each}", each) for each in STRATEGIES}
    _run([*resumed.values(), *moved.values()])
    alone = {each: bench.half_done(name, whole[each], f"alone-{each}", "ddp", devices=1) for each in STRATEGIES}
    _run(list(alone.values()), processes=1)
    for each in STRATEGIES:
        cells = [
            _difference(whole[each], whole["ddp"]),
            _difference(resumed[each], whole[each]),
            _difference(moved[each], whole["ddp"]),
            _difference(alone[each], whole["ddp"]),
        ]
        print(f"| {name} | {each} | {' | '.join(cells)} |", flush=True)


def _run(stages: list[FrozenStage], processes: int = 2) -> None:
    statuses = run_on_ranks(stages, processes=processes, timeout_s=900)
    if any(statuses):
        sys.exit("\n".join(map(log_of, stages)))


def _weights(stage: FrozenStage) -> dict[str, torch.Tensor]:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None, log_of(stage)
    (file,) = artifact.path.glob("*.safetensors")
    return load_file(file)


def _difference(stage: FrozenStage, reference: FrozenStage) -> str:
    own, expected = _weights(stage), _weights(reference)
    if all(torch.equal(own[name], expected[name]) for name in expected):
        return "bits"
    return f"{max(float((own[name] - expected[name]).abs().max()) for name in expected):.0e}"


if __name__ == "__main__":
    main()
