"""A checkpoint of any strategy is resumed from by any other, on another number of processes too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.workflow.checkpoint import Checkpoint, latest_checkpoint
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.progress import Outcome
from pipeline.workflow.sealed import read_json
from tests.support.ranks import log_of, run_on_ranks
from tests.support.tiny_runs import plan_stages, rows_of, run_stage_of, run_until

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
STEPS = 6
HALF = "samples-000000000024"
SETTINGS = [
    "stage.clip.global_batch_size=8",
    "stage.prior.global_batch_size=8",
    f"stage.prior.max_samples={8 * STEPS}",
    "stage.prior.optimizer.ema_decay=0.9",
    "trainer.checkpoint_every_samples=8",
    "trainer.keep_checkpoints=9",
    "trainer.drop_checkpoints=false",
]


class Runs:
    """The prior, whose statistics are frozen parameters, on two processes: whole by each strategy, and gone on with.

    `pairs` go on from half-done stages, by (first, then). All is one launch: imports take longer than training.
    """

    def __init__(self, place: Path, strategies: tuple[str, ...]) -> None:
        self.place = place
        self.strategies = strategies
        run_until(place / "inputs", "embed", *SETTINGS)
        self.whole = {name: self.stage(f"whole-{name}", name) for name in strategies}
        self.pairs = {(first, then): self.half_done(first, then) for first in strategies for then in strategies}
        stages = [*self.whole.values(), *self.pairs.values()]
        assert run_on_ranks(stages) == [0, 0], "\n".join(map(log_of, stages))

    def stage(self, name: str, strategy: str, devices: int = 2) -> FrozenStage:
        artifacts = self.place / name / "artifacts"
        artifacts.mkdir(parents=True)
        for made in ("prepare", "clip", "embed"):
            (artifacts / made).symlink_to(self.place / "inputs" / "artifacts" / made)
        overrides = [f"trainer={strategy}", f"trainer.devices={devices}"]
        return plan_stages(artifacts.parent, *SETTINGS, *overrides)["prior"]

    def half_done(self, first: str, then: str, devices: int = 2, name: str = "") -> FrozenStage:
        """A stage that strategy `first` leaves half done on two processes, to be gone on with by another.

        Its checkpoint is a link, to be followed once `first` has trained.
        """
        stage = self.stage(f"{name}{first}-{then}-{devices}", then, devices)
        source, target = self.whole[first].work / "checkpoints", stage.work / "checkpoints"
        target.mkdir(parents=True)
        for file in (f"{HALF}.ckpt", f"{HALF}.json"):
            (target / file).symlink_to(source / file)
        return stage

    def with_other_constants(self, first: str, then: str, devices: int = 2) -> FrozenStage:
        """A half-done stage whose mean of the embeddings is 1 higher in the checkpoint."""
        stage = self.half_done(first, then, devices, name="changed-")
        checkpoint, record = (stage.work / "checkpoints" / f"{HALF}{suffix}" for suffix in (".ckpt", ".json"))
        for link, copy in ((checkpoint, shutil.copytree), (record, shutil.copy)):
            original = link.resolve()
            link.unlink()
            copy(original, link)
        file = checkpoint / "constants.safetensors"
        constants = load_file(file)
        save_file({**constants, "clip_mean": constants["clip_mean"] + 1}, file)
        described = read_json(record)
        described["files"][file.name] = file_sha256(file)
        record.write_text(json.dumps(described))
        return stage


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Runs(tmp_path_factory.mktemp("elastic"), STRATEGIES)
    torch.set_num_threads(threads)
    return made


def weights(stage: FrozenStage) -> dict[str, Tensor]:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None, log_of(stage)
    return load_file(artifact.path / "weights.safetensors")


def rows(stage: FrozenStage) -> list[dict[str, float]]:
    artifact = stage.store.find(stage.stage, stage.fingerprint)
    assert artifact is not None
    return rows_of(artifact)


def test_every_strategy_learns_what_ddp_learns(runs: Runs):
    expected = weights(runs.whole["ddp"])
    for strategy, stage in runs.whole.items():
        assert f"training by {strategy} on 2 devices" in log_of(stage)
        for name, weight in weights(stage).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5, msg=f"{strategy} {name}")


def test_every_strategy_goes_on_from_the_checkpoint_of_every_other_one(runs: Runs):
    for (first, then), stage in runs.pairs.items():
        assert f"resuming from {HALF}.ckpt, which 2 processes wrote" in log_of(stage)
        own, expected = weights(stage), weights(runs.whole[then])
        for name in expected:
            if first == then:
                assert torch.equal(own[name], expected[name]), f"{first}: {name}"
            torch.testing.assert_close(own[name], expected[name], rtol=1e-3, atol=1e-5, msg=f"{first} {then} {name}")
        second_half = rows(runs.whole[then])[STEPS // 2 :]
        for row, undisturbed in zip(rows(stage), second_half, strict=True):
            assert row["samples_seen"] == undisturbed["samples_seen"]
            assert row.get("learning_rate") == undisturbed.get("learning_rate")
            for name in row.keys() & {"train/loss", "validation/loss"}:
                assert row[name] == pytest.approx(undisturbed[name], rel=1e-4)


def test_this_process_goes_on_where_two_stopped_whatever_their_strategy(runs: Runs):
    resumed = [runs.half_done(first, "ddp", devices=1) for first in runs.strategies]
    assert {run_stage_of(stage) for stage in resumed} == {Outcome.FINISHED}, "\n".join(map(log_of, resumed))
    for stage in resumed:
        for name, expected in weights(runs.whole["ddp"]).items():
            torch.testing.assert_close(weights(stage)[name], expected, rtol=1e-3, atol=1e-5)


def test_one_process_goes_on_under_zero_where_two_stopped_whatever_their_strategy(runs: Runs):
    resumed = [runs.half_done(first, then, devices=1) for first in runs.strategies for then in ("zero1", "zero3")]
    assert run_on_ranks(resumed, processes=1) == [0], "\n".join(map(log_of, resumed))
    for stage in resumed:
        for name, expected in weights(runs.whole["ddp"]).items():
            torch.testing.assert_close(weights(stage)[name], expected, rtol=1e-3, atol=1e-5)


def test_the_averaged_weights_are_those_of_their_formula(runs: Runs):
    """Kept by hand from the weights in the checkpoint of each step, in float64."""
    for stage in runs.whole.values():
        average: dict[str, Tensor] = {}
        for step in range(1, STEPS + 1):
            checkpoint = stage.work / "checkpoints" / f"samples-{8 * step:012}.ckpt"
            decay = min(0.9, (1 + step) / (10 + step))
            for name, weight in whole_state(checkpoint, "weight").items():
                average[name] = average.get(name, weight) * decay + weight * (1 - decay)
        final = stage.work / "checkpoints" / f"samples-{8 * STEPS:012}.ckpt"
        saved, published = whole_state(final, "ema"), weights(stage)
        assert saved.keys() == average.keys()
        assert saved.keys() < published.keys()
        for name, expected in average.items():
            torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-7)
            assert torch.equal(published[name].flatten().double(), saved[name])


def require_changed_constants(runs: Runs, stage: FrozenStage) -> None:
    before = weights(runs.whole[runs.strategies[-1]])
    assert torch.equal(weights(stage)["clip_mean"], before["clip_mean"] + 1)
    assert torch.equal(weights(stage)["clip_std"], before["clip_std"])


def test_frozen_parameters_come_back_from_the_checkpoint(runs: Runs):
    stage = runs.with_other_constants(runs.strategies[-1], "ddp", devices=1)
    assert run_stage_of(stage) is Outcome.FINISHED, log_of(stage)
    require_changed_constants(runs, stage)


def test_frozen_parameters_come_back_whatever_the_strategy_on_two_processes(runs: Runs):
    stages = [runs.with_other_constants(runs.strategies[-1], then) for then in runs.strategies]
    assert run_on_ranks(stages) == [0, 0], "\n".join(map(log_of, stages))
    for stage in stages:
        require_changed_constants(runs, stage)


def test_each_process_writes_a_part_and_no_element_twice(runs: Runs):
    for stage in runs.whole.values():
        checkpoint = latest_checkpoint(stage.work)
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.writers == 2
        shapes = json.loads((checkpoint.path / "description.json").read_text())["trained"]
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
            assert {name: len(each) for name, each in whole_state(checkpoint.path, state).items()} == sizes


def whole_state(checkpoint: Path, state: str) -> dict[str, Tensor]:
    """Each parameter's state, float64 [numel], put together from the files of all processes."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(checkpoint.glob("fragments-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, kind, start = key.split("|")
                if kind == state:
                    pieces.setdefault(name, []).append((int(start), file.get_tensor(key).double()))
    return {
        name: torch.cat([part for _, part in sorted(found, key=lambda each: each[0])]) for name, found in pieces.items()
    }
