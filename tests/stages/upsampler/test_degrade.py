import numpy as np
import pytest
import torch

from pipeline.data.draws import SampleDraws
from stages.upsampler.degrade import blur, bsr, degrade
from stages.upsampler.settings import Degradation


def pictures(count=6, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def draws(first=0, count=6):
    return SampleDraws(torch.arange(first, first + count))


def test_blur_is_the_papers_gaussian():
    point = torch.zeros(1, 3, 9, 9)
    point[..., 4, 4] = 1.0
    profile = np.exp(-0.5 * (np.array([-1.0, 0.0, 1.0]) / 0.6) ** 2)
    profile /= profile.sum()

    blurred = blur(point)

    expected = torch.from_numpy(np.outer(profile, profile)).float()
    torch.testing.assert_close(blurred[0, 0, 3:6, 3:6], expected, rtol=1e-4, atol=1e-6)
    assert blurred[0, 0].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_without_degradation_the_condition_is_the_reduced_picture():
    low = pictures()

    assert torch.equal(degrade(Degradation.NONE, low, draws()), low)


@pytest.mark.parametrize("kind", [Degradation.BLUR, Degradation.BSR])
def test_degraded_pictures_keep_shape_and_range_and_differ(kind):
    low = pictures()

    degraded = degrade(kind, low, draws())

    assert degraded.shape == low.shape
    assert degraded.dtype == torch.float32
    assert degraded.abs().max() <= 1.0
    assert ((degraded - low).abs().flatten(1).max(1).values > 0.01).all()


def test_bsr_depends_on_the_sample_and_not_on_its_batch():
    low = pictures()

    whole = bsr(low, draws())
    parts = torch.cat([bsr(low[:2], draws(0, 2)), bsr(low[2:], draws(2, 4))])

    assert torch.equal(whole, parts)


def test_bsr_degrades_the_same_picture_differently_for_different_samples():
    low = pictures(1).expand(8, -1, -1, -1)

    degraded = bsr(low, draws(0, 8))

    distances = torch.cdist(degraded.flatten(1), degraded.flatten(1))
    assert (distances[~torch.eye(8, dtype=torch.bool)] > 0.1).all()


def test_bsr_leaves_the_mean_colour_of_a_plain_picture():
    low = torch.tensor([0.5, -0.25, 0.0]).reshape(1, 3, 1, 1).expand(32, 3, 16, 16)

    assert (bsr(low, draws(0, 32)).mean((0, 2, 3)) - low[0, :, 0, 0]).abs().max() < 0.03
