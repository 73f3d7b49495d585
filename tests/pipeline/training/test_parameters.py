import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.training.checkpoints import latest_checkpoint
from pipeline.training.optimizer import build_optimizer
from pipeline.training.parameters import freeze, learning_rate_factors
from pipeline.training.stage import run_stage
from pipeline.workflow.progress import Outcome, read_failure
from tests.support import tiny
from tests.support.tiny import SCRIPT, are_equal, finished, frozen, run, weights

FINE_TUNING = {"freeze": ("1.*",), "learning_rate_factors": {"4.bias": 0.1}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"lower": nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), "upper": nn.Sequential(nn.Linear(8, 2))}
    ).double()


def settings(**changes):
    return tiny.OPTIMIZER.model_copy(update=changes)


def test_what_a_pattern_fits_does_not_train_and_the_rest_does():
    frozen_network = network()
    freeze(frozen_network, ["lower.0.*", "*.1.bias"])
    trained = [name for name, each in frozen_network.named_parameters() if each.requires_grad]
    assert trained == ["lower.1.weight", "upper.0.weight", "upper.0.bias"]


def test_names_are_those_of_the_weights_file():
    whole = nn.ModuleDict({"network": network()})
    freeze(whole, ["lower.*"], prefix="network.")
    factors = learning_rate_factors(whole, settings(learning_rate_factors={"upper.*": 0.5}), None, prefix="network.")
    assert not whole.get_parameter("network.lower.0.weight").requires_grad
    assert (factors["network.upper.0.bias"], factors["network.lower.0.bias"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["uper.0.*"], r"optimizer\.freeze: 'uper\.0\.\*' fits no parameter; there are for example upper\.0\."),
        (["lower.0.weight", "nothing"], r"optimizer\.freeze: 'nothing' fits no parameter; there are for example "),
        (["*"], r"optimizer\.freeze leaves no parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: list[str], message: str):
    with pytest.raises(UserError, match=message):
        freeze(network(), patterns)


def test_factors_of_patterns_multiply_whatever_their_order():
    one = {"lower.*": 0.5, "*.bias": 0.1}
    other = dict(reversed(one.items()))
    factors, again = (
        learning_rate_factors(network(), settings(learning_rate_factors=each), None) for each in (one, other)
    )
    assert factors == again
    assert factors["lower.0.bias"] == pytest.approx(0.05)
    assert (factors["lower.0.weight"], factors["upper.0.weight"]) == (0.5, 1.0)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate_factors: 'visual\.\*' fits no parameter"):
        learning_rate_factors(network(), settings(learning_rate_factors={"visual.*": 0.5}), None)


def test_a_decay_by_layers_needs_layers():
    above = {name: 2 if name.startswith("lower") else 0 for name, _ in network().named_parameters()}
    factors = learning_rate_factors(network(), settings(layer_decay=0.5, learning_rate_factors={"*.1.*": 0.1}), above)
    assert factors["lower.0.weight"] == 0.25
    assert factors["lower.1.weight"] == pytest.approx(0.025)
    assert factors["upper.0.weight"] == 1.0
    with pytest.raises(UserError, match=r"optimizer\.layer_decay=0\.5: this network has no sequence of blocks"):
        learning_rate_factors(network(), settings(layer_decay=0.5), None)


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_step_of_a_parameter_is_the_learning_rate_times_its_factor(fused: bool):
    trained = network()
    factors = {name: 0.1 if name.startswith("lower") else 1.0 for name, _ in trained.named_parameters()}
    freeze(trained, ["lower.1.*"])
    before = {name: each.detach().clone() for name, each in trained.named_parameters()}
    ranges = {"upper.0.bias": (-1.0, 1.0)}
    optimizer = build_optimizer(trained, settings(weight_decay=0.0), ranges, factors, fused=fused)
    for each in trained.parameters():
        each.grad = torch.full_like(each, 3.0) if each.requires_grad else None

    optimizer.step()

    for name, each in trained.named_parameters():
        expected = 0.0 if name.startswith("lower.1") else 1e-2 * factors[name]
        torch.testing.assert_close(before[name] - each, torch.full_like(each, expected), rtol=1e-6, atol=1e-9)


def test_without_factors_the_groups_are_those_that_finished_runs_had():
    groups = build_optimizer(network(), settings(), {}, fused=True).param_groups
    assert [(len(group["params"]), group["weight_decay"], group["lr"]) for group in groups] == [
        (2, 0.01, 1e-2),
        (4, 0.0, 1e-2),
    ]


def test_frozen_weights_keep_their_bits_and_stand_in_the_artifact_and_its_average(tmp_path: Path):
    short, long = (frozen(tmp_path / str(each), max_samples=each, fine_tuning=FINE_TUNING) for each in (8, 80))
    assert [run(short), run(long)] == [Outcome.FINISHED] * 2, read_failure(long.work)
    one, other = weights(short), weights(long)
    assert one.keys() == other.keys() == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert all(torch.equal(one[name], other[name]) == name.startswith("1.") for name in one)


def test_a_fine_tuning_that_was_stopped_resumes_to_the_bits_of_an_undisturbed_one(tmp_path: Path):
    undisturbed, stage = (frozen(tmp_path / each, dropout=0.3, fine_tuning=FINE_TUNING) for each in ("one", "other"))
    assert run(undisturbed) is Outcome.FINISHED
    SCRIPT.at_samples, SCRIPT.happens = 40, lambda context: context.interruption.set()
    assert run(stage) is Outcome.INTERRUPTED
    assert latest_checkpoint(stage.work) is not None
    SCRIPT.at_samples = None
    assert run(stage) is Outcome.FINISHED
    assert are_equal(weights(stage), weights(undisturbed))


def test_a_pattern_that_fits_nothing_ends_the_stage_in_one_line(tmp_path: Path):
    stage = frozen(tmp_path, fine_tuning={"freeze": ("2.*",)})
    assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert failure.message.startswith("optimizer.freeze: '2.*' fits no parameter; there are for example ")


def test_a_stage_with_nothing_to_see_publishes_its_network_as_it_is(tmp_path: Path):
    stage = frozen(tmp_path, max_samples=0)
    assert run(stage) is Outcome.FINISHED, read_failure(stage.work)
    assert finished(stage).manifest.samples_seen == 0
    assert run_stage(stage, threading.Event()) is Outcome.REUSED
