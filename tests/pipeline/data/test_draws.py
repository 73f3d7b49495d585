import numpy as np
import pytest
import torch

from pipeline.data.draws import SampleDraws
from pipeline.data.mixing import mix, purpose_key, sample_seed, uniform

SEEDS = torch.from_numpy(sample_seed(0, 0, np.arange(20_000)))
DRAWS = SampleDraws(SEEDS)


def mixed(seeds: torch.Tensor, purpose: str) -> np.ndarray:
    return mix(mix(seeds.numpy().view(np.uint64) ^ np.uint64(purpose_key(purpose))))


def test_uniform_draws_fill_the_unit_interval_evenly():
    draws = DRAWS.uniform("dropout")
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 43.8  # 0.999 quantile at 19 degrees of freedom


def test_integers_are_even_and_in_range():
    draws = DRAWS.integer("timestep", 10)
    counts = torch.bincount(draws, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # 0.999 quantile at 9 degrees of freedom


def test_normal_draws_are_standard_normal():
    draws = SampleDraws(SEEDS[:500]).normal("noise", (3, 8, 8))
    assert draws.shape == (500, 3, 8, 8)
    assert draws.mean().item() == pytest.approx(0, abs=0.015)
    assert draws.std().item() == pytest.approx(1, abs=0.015)
    assert (draws.abs() < 1.959964).float().mean().item() == pytest.approx(0.95, abs=0.005)


def test_normal_draws_are_those_of_a_generator_of_each_sample_s_own():
    draws = SampleDraws(SEEDS[:50]).normal("noise", (3, 5))  # an odd number of them: a generator keeps half a word
    for row, key in zip(draws, mixed(SEEDS[:50], "noise"), strict=True):
        own = np.random.Generator(np.random.Philox(key=int(key))).standard_normal((3, 5), np.float32)
        assert torch.equal(row, torch.from_numpy(own))


def test_what_was_drawn_ahead_is_taken_and_in_another_shape_refused():
    ahead = {"noise": torch.zeros(2, 3)}
    draws = SampleDraws(SEEDS[:2], "cpu", ahead)
    assert draws.normal("noise", (3,)) is ahead["noise"]
    assert draws.normal("other", (3,)).abs().sum() > 0
    with pytest.raises(AssertionError, match=r"noise was drawn ahead in another shape: \(3,\)"):
        draws.normal("noise", (4,))


def test_purposes_and_neighbours_are_independent():
    one, other = DRAWS.uniform("caption"), DRAWS.uniform("image")
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1]) < 0.03
    noise = SampleDraws(SEEDS[:200]).normal("a", (64,)), SampleDraws(SEEDS[:200]).normal("b", (64,))
    assert abs(torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1]) < 0.04


def test_a_sample_draws_the_same_whatever_batch_it_is_in():
    chosen = torch.tensor([17, 3, 400])
    few, many = SampleDraws(SEEDS[chosen]), SampleDraws(SEEDS[:500])
    assert torch.equal(few.uniform("x"), many.uniform("x")[chosen])
    assert torch.equal(few.integer("x", 1000), many.integer("x", 1000)[chosen])
    assert torch.equal(few.normal("x", (2, 5)), many.normal("x", (2, 5))[chosen])


def test_the_torch_hash_is_the_numpy_hash():
    expected = mixed(SEEDS, "x") >> np.uint64(40)
    assert torch.equal(DRAWS.uniform("x"), torch.from_numpy(expected.astype(np.float32) / 2**24))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    DRAWS.uniform("x")
    DRAWS.integer("x", 5)
    SampleDraws(SEEDS[:2]).normal("x", (3,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws():
    there = SampleDraws(SEEDS[:300], "cuda")
    here = SampleDraws(SEEDS[:300])
    assert torch.equal(there.uniform("x").cpu(), here.uniform("x"))
    assert torch.equal(there.integer("x", 1000).cpu(), here.integer("x", 1000))
    assert torch.equal(there.normal("x", (3, 4)).cpu(), here.normal("x", (3, 4)))


def test_numpy_and_torch_draw_the_same_uniform_numbers():
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    drawn = SampleDraws(torch.from_numpy(seeds)).uniform("a purpose")
    np.testing.assert_array_equal(uniform(seeds, "a purpose"), drawn.double().numpy())
