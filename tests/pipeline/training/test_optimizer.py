from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline.config import DecayKind, NonFinite, OptimizerSettings
from pipeline.training.optimizer import (
    AdamWithEma,
    _move_on_the_device,
    build_optimizer,
    learning_rate_factor,
)

SETTINGS = OptimizerSettings(
    learning_rate=0.01,
    warmup_samples=100,
    decay=DecayKind.COSINE,
    final_learning_rate_share=0.1,
    beta1=0.9,
    beta2=0.98,
    epsilon=1e-8,
    weight_decay=0.1,
    gradient_clip_norm=None,
    non_finite=NonFinite.STOP,
    ema_decay=0.95,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double()


def build(trained: nn.Module, settings: OptimizerSettings = SETTINGS) -> AdamWithEma:
    return build_optimizer(trained, settings, {}, fused=True)


def averages(optimizer: AdamWithEma, trained: nn.Module) -> list[torch.Tensor]:
    return [optimizer.state[parameter]["ema"] for parameter in trained.parameters()]


def give_gradients(trained: nn.Module, step: int) -> None:
    batch = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    trained.zero_grad()
    trained(batch).square().mean().backward()


def train(trained: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    give_gradients(trained, step)
    optimizer.step()


@pytest.mark.parametrize("ema_decay", [0.95, 0.5])
def test_weights_follow_torch_s_adamw_and_the_average_a_hand_kept_one(ema_decay: float):
    trained, reference = network(), network()
    reference.load_state_dict(trained.state_dict())
    ours = build(trained, SETTINGS.model_copy(update={"ema_decay": ema_decay}))
    matrices = [each for each in reference.parameters() if each.ndim >= 2]
    vectors = [each for each in reference.parameters() if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    average = None
    for step in range(1, 41):
        train(trained, ours, step)
        train(reference, theirs, step)
        weights = [each.detach().clone() for each in reference.parameters()]
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = (
            weights
            if average is None
            else [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
        )
    assert average is not None
    for own, expected in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)
    for own, expected in zip(averages(ours, trained), average, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)


def test_a_parameter_with_a_range_is_kept_in_it_and_so_is_its_average():
    trained = network()
    optimizer = build_optimizer(trained, SETTINGS, {"0.bias": (-0.01, 0.02)}, fused=True)
    free = network()
    reference = build(free)
    for step in range(20):
        train(trained, optimizer, step)
        train(free, reference, step)
    bias, average = trained.get_parameter("0.bias").detach(), optimizer.state[trained.get_parameter("0.bias")]["ema"]
    assert float(free.get_parameter("0.bias").abs().max()) > 0.02
    for tensor in (bias, average):
        assert -0.01 <= float(tensor.min()) <= float(tensor.max()) <= 0.02
    assert float(bias.max()) == 0.02 or float(bias.min()) == -0.01


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_whose_gradient_is_not_finite_leaves_weights_moments_and_average_as_they_are(fused: bool):
    trained = network()
    optimizer = build_optimizer(trained, SETTINGS, {}, fused=fused)
    train(trained, optimizer, 0)
    before = [each.detach().clone() for each in [*trained.parameters(), *averages(optimizer, trained)]]
    optimizer.prepare_step(torch.tensor(float("inf")), 1.0)
    train(trained, optimizer, 1)
    assert all(map(torch.equal, before, [*trained.parameters(), *averages(optimizer, trained)]))
    optimizer.prepare_step(torch.tensor(0.5), 1.0)
    train(trained, optimizer, 2)
    assert not any(map(torch.equal, before, [*trained.parameters(), *averages(optimizer, trained)]))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_clips_as_torch_does(fused: bool):
    trained, reference = network(), network()
    reference.load_state_dict(trained.state_dict())
    optimizer = build_optimizer(trained, SETTINGS, {}, fused=fused)
    plain = build_optimizer(reference, SETTINGS, {}, fused=fused)
    for step in range(5):
        give_gradients(trained, step)
        give_gradients(reference, step)
        gradients = [each.grad for each in trained.parameters() if each.grad is not None]
        optimizer.prepare_step(get_total_norm(gradients), 0.01)
        assert float(clip_grad_norm_(reference.parameters(), 0.01)) > 0.01
        optimizer.step()
        plain.step()
    for mine, theirs in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_the_average_moves_alike_where_its_number_of_steps_is_on_another_device():
    weights = [torch.randn(3, 4), torch.randn(2**26 + 1), torch.randn(5)]
    averages = [torch.randn_like(each) for each in weights]
    expected = [torch.lerp(average, weight, 0.25) for average, weight in zip(averages, weights, strict=True)]
    _move_on_the_device(weights, averages, torch.tensor(0.25))
    for mine, theirs in zip(averages, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_average_is_part_of_the_optimizer_s_state():
    trained = network()
    optimizer = build(trained)
    train(trained, optimizer, 0)
    restored = build(trained)
    restored.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, averages(restored, trained), averages(optimizer, trained)))


def test_a_decay_of_zero_keeps_no_average():
    trained = network()
    optimizer = build(trained, SETTINGS.model_copy(update={"ema_decay": 0.0}))
    train(trained, optimizer, 0)
    assert all("ema" not in state for state in optimizer.state.values())


def test_vectors_are_not_decayed_and_frozen_parameters_are_left_out():
    trained = network()
    frozen = next(trained.parameters())
    frozen.requires_grad_(False)
    optimizer = build(trained)
    assert isinstance(optimizer, AdamWithEma)
    decay_of = {
        id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert id(frozen) not in decay_of
    for parameter in list(trained.parameters())[1:]:
        assert decay_of[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_the_warm_up_rises_linearly_to_the_learning_rate():
    factors = [learning_rate_factor(SETTINGS, samples, 1100) for samples in range(101)]
    steps = [after - before for before, after in pairwise(factors)]
    assert factors[0] > 0
    assert factors[100] == 1.0
    assert max(steps) == pytest.approx(min(steps))


def test_the_cosine_decay_is_torch_s_on_the_axis_of_samples():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000, eta_min=0.1)
    for samples in range(1000):
        assert learning_rate_factor(SETTINGS, 100 + samples, 1100) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("decay", "halfway", "end"), [(DecayKind.CONSTANT, 1.0, 1.0), (DecayKind.LINEAR, 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_every_decay_ends_at_its_share_and_stays_there(decay: DecayKind, halfway: float, end: float):
    settings = SETTINGS.model_copy(update={"decay": DecayKind(decay)})
    assert learning_rate_factor(settings, 600, 1100) == pytest.approx(halfway)
    assert learning_rate_factor(settings, 1100, 1100) == pytest.approx(end)
    assert learning_rate_factor(settings, 5000, 1100) == pytest.approx(end)


def test_without_a_warm_up_training_begins_at_the_full_rate_and_a_short_run_may_be_all_warm_up():
    assert learning_rate_factor(SETTINGS.model_copy(update={"warmup_samples": 0}), 0, 1000) == 1.0
    assert 0 < learning_rate_factor(SETTINGS, 50, 50) < 1.0
