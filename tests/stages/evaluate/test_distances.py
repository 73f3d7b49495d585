"""Distances of features against torchmetrics, closed forms and naive loops."""

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from stages.evaluate.distances import frechet_distance, kernel_distance, precision_and_recall, rbf_distance
from stages.evaluate.encoders import joined
from stages.evaluate.estimate import jackknife, mean
from stages.evaluate.metric import CLIP, INCEPTION, JUDGE_CLIP, Embeds, Features
from stages.evaluate.settings import METRICS, metric_of

DISTANCES = ["fid", "kid", "cmmd", "fd_dinov2", "precision_recall"]


def normal(samples: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kernel_distance_is_torchmetrics_s_over_all_pairs():
    made, real = normal(60, 5) + 0.5, normal(60, 5, seed=1)
    assert kernel_distance(made, real) == pytest.approx(float(poly_mmd(real, made)), rel=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_in_the_mean():
    found = torch.tensor([kernel_distance(normal(30, 4, 2 * seed), normal(30, 4, 2 * seed + 1)) for seed in range(300)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 300**0.5
    assert float(found.min()) < 0 < float(found.max())


def test_cmmd_of_two_points_is_its_closed_form():
    # exp(-|x - y|^2 / 200) between points on the unit circle at a right angle, of which |x - y|^2 = 2.
    one, other = torch.tensor([[1.0, 0.0]]).repeat(3, 1), torch.tensor([[0.0, 5.0]]).repeat(2, 1)
    expected = 1000 * (1 + 1 - 2 * float(torch.exp(torch.tensor(-2 / 200, dtype=torch.float64))))
    assert rbf_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert rbf_distance(one, one) == 0


def test_precision_and_recall_are_those_of_a_naive_loop():
    made, real = normal(40, 3) * 0.7 + 0.4, normal(50, 3, seed=1)

    def share(of: Tensor, manifold: Tensor) -> float:
        radii = [sorted(float((each - other).norm()) for other in manifold)[3] for each in manifold]
        return sum(
            any(float((one - centre).norm()) <= radius for centre, radius in zip(manifold, radii, strict=True))
            for one in of
        ) / len(of)

    found = precision_and_recall(made, real)
    assert found == pytest.approx((share(made, real), share(real, made)))
    assert 0 < found[1] < found[0]


def test_a_narrow_part_of_what_is_real_is_precise_and_recalls_little():
    real = normal(400, 4)
    precision, recall = precision_and_recall(0.1 * normal(400, 4, seed=1), real)
    assert precision > 0.95
    assert recall < 0.2


@pytest.mark.parametrize("name", DISTANCES)
def test_real_pictures_are_near_to_themselves_and_noise_is_far(name: str):
    real, noise = normal(80, 6), 5 - normal(80, 6, seed=1)
    same, far = (
        metric_of(f"{name}@judge_clip").results(Embeds({JUDGE_CLIP: Features(real, made)}, None, 8))
        for made in (real, noise)
    )
    if name == "precision_recall":
        assert [same["judge_clip/precision"], same["judge_clip/recall"]] == [1, 1]
        assert far["judge_clip/precision"] < 0.05
        assert far["judge_clip/recall"] < 0.05
        return
    key = f"judge_clip/{name}"
    assert abs(same[key]) < 0.05 * far[key]
    assert far[f"{key}_low"] < far[key] < far[f"{key}_high"]


def test_parts_of_several_processes_joined_give_what_the_whole_gives():
    whole = Features(normal(50, 4), normal(50, 4, 1), normal(50, 4, 2))
    assert whole.text is not None
    parts = [
        Features(whole.real[place], whole.made[place], whole.text[place]) for place in (slice(0, 13), slice(13, 50))
    ]
    for name in METRICS:
        metric = name if name in ("similarity", "prior") else f"{name}@clip"
        found, expected = (
            metric_of(metric).results(Embeds({CLIP: features}, whole.made, 8)) for features in (joined(parts), whole)
        )
        assert found == expected
        assert expected


def test_a_mean_has_the_normal_interval():
    estimate = mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 1.959964 * (5 / 3) ** 0.5 / 2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert mean(torch.tensor([1.0])).named("x") == {"x": 1.0}


def test_the_jackknife_of_a_mean_is_nearly_its_normal_interval():
    values = normal(1000, 1)[:, 0]
    found = jackknife(lambda rows: {"x": float(values[rows].mean())}, len(values))["x"]
    expected = mean(values)
    assert found.value == expected.value
    assert found.high - found.value == pytest.approx(expected.high - expected.value, rel=0.6)


def test_the_jackknife_s_interval_holds_the_expected_distance_about_nineteen_times_in_twenty():
    def trial(seed: int) -> Features:
        return Features(normal(60, 3, 2 * seed), 0.5 + normal(60, 3, 2 * seed + 1))

    trials = [metric_of("kid@clip").results(Embeds({CLIP: trial(seed)}, None, 8)) for seed in range(150)]
    expected = sum(each["clip/kid"] for each in trials) / len(trials)
    held = sum(each["clip/kid_low"] <= expected <= each["clip/kid_high"] for each in trials)
    assert 0.88 < held / len(trials) < 1


def test_of_few_pictures_there_is_no_interval_and_of_three_no_distance():
    def results(samples: int) -> dict[str, float]:
        features = Features(normal(samples, 3), normal(samples, 3, 1))
        return metric_of("fid").results(Embeds({INCEPTION: features}, None, 8))

    assert list(results(12)) == ["fid"]
    assert results(3) == {}


def test_a_distance_in_an_encoder_that_is_not_there_is_left_out():
    assert metric_of("fid").results(Embeds({}, None, 8)) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fod", "'fod' is no metric; there are .*fid"),
        ("fid@vgg", "'vgg' is no encoder; there are clip, judge_clip, inception"),
        ("similarity@clip", "similarity is of no encoder in particular; write similarity"),
    ],
)
def test_what_is_no_metric_is_refused_with_those_that_there_are(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        metric_of(text)


def test_a_metric_s_distance_is_that_of_all_its_features():
    made, real = normal(40, 3), normal(40, 3, 1) + 0.3
    found = metric_of("fd_dinov2@clip").results(Embeds({CLIP: Features(real, made)}, None, 8))
    assert found["clip/fd_dinov2"] == pytest.approx(frechet_distance(made, real))
