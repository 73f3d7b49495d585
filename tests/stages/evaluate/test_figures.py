import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio

from stages.clip.retrieval import retrieval_recall
from stages.evaluate.distances import frechet_distance
from stages.evaluate.estimate import mean_of_shares, proportion
from stages.pictures import peak_signal_to_noise


def naive_recall(image_embed: Tensor, text_embed: Tensor, at: int) -> float:
    """Both directions, one query at a time, by sorting."""
    hits = []
    for queries, candidates in ((text_embed, image_embed), (image_embed, text_embed)):
        for number, query in enumerate(queries):
            scores = sorted(((float(query @ each), place) for place, each in enumerate(candidates)), reverse=True)
            hits.append(number in [place for _, place in scores[:at]])
    return sum(hits) / len(hits)


def embeds(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    image = torch.randn(samples, 8, generator=generator, dtype=torch.float64)
    text = image + 1.5 * torch.randn(samples, 8, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_recall_over_all_is_that_of_a_naive_loop():
    image, text = embeds(30)
    recall = retrieval_recall(image, text, pool=64)
    for at in (1, 5, 10):
        assert recall[f"R@{at}/all"] == recall[f"R@{at}/30"] == pytest.approx(naive_recall(image, text, at))
    assert 0 < recall["R@1/all"] < recall["R@10/all"] < 1


def test_recall_among_pools_is_the_mean_over_whole_pools():
    image, text = embeds(45)
    recall = retrieval_recall(image, text, pool=20)
    for at in (1, 5, 10):
        pools = [naive_recall(image[first : first + 20], text[first : first + 20], at) for first in (0, 20)]
        assert recall[f"R@{at}/20"] == pytest.approx(sum(pools) / 2)


def test_equal_captions_count_as_misses_of_each_other():
    image, _ = embeds(4)
    recall = retrieval_recall(image, image[:1].expand(4, -1), pool=4)
    assert recall["R@1/4"] < 0.5
    assert retrieval_recall(image, image, pool=4)["R@1/4"] == 1.0


def test_psnr_is_torchmetrics_s_mean_over_pictures():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    image = (truth + torch.tensor([0.01, 0.1, 0.5])[:, None, None, None]).clamp(-1, 1)
    expected = torch.stack(
        [peak_signal_noise_ratio(a[None], b[None], data_range=2.0) for a, b in zip(image, truth, strict=True)]
    ).mean()
    assert peak_signal_to_noise(image, truth) == pytest.approx(float(expected), rel=1e-5)


def test_psnr_of_equal_pictures_is_finite():
    assert peak_signal_to_noise(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)) > 90


def test_frechet_distance_of_gaussians_is_that_of_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor([1.0, 2.0, 3.0])
    reference = torch.randn(20_000, 3, generator=generator)
    shifted = std * torch.randn(20_000, 3, generator=generator) + torch.tensor([1.0, 0.0, -1.0])
    # For diagonal covariances: |difference of the means|^2 + sum (difference of the standard deviations)^2.
    assert frechet_distance(shifted, reference) == pytest.approx(2 + float((std - 1).square().sum()), rel=0.05)
    assert frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)


def test_a_proportion_has_wilson_s_interval():
    # R: binom::binom.confint(8, 10, methods = "wilson")
    estimate = proportion(torch.tensor([True] * 8 + [False] * 2))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-5)
    certain = proportion(torch.ones(20, dtype=torch.bool))
    assert certain.high == pytest.approx(1)
    assert 0.8 < certain.low < 0.9


def test_the_interval_of_a_mean_of_shares_holds_the_true_mean_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        # Dependent within a row: all of a row's values have one probability, with mean 0.6.
        of_row = 0.2 + 0.8 * torch.rand(100, 1, generator=generator)
        estimate = mean_of_shares(torch.rand(100, 5, generator=generator) < of_row)
        held += estimate.low <= 0.6 <= estimate.high
    assert 0.9 < held / 400 < 0.985
