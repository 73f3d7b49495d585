import re

import pytest

from pipeline.data.splits import Split, check_split_sizes, split_position
from pipeline.errors import UserError
from tests.support.shards import split_of

KEYS = [f"{number:06d}" for number in range(20_000)]


def test_the_validation_share_is_the_fraction_asked_for():
    share = sum(split_of(key, 0.1) is Split.VALIDATION for key in KEYS) / len(KEYS)
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_larger_fraction_moves_samples_only_from_train_to_validation():
    small = {key for key in KEYS if split_of(key, 0.1) is Split.VALIDATION}
    large = {key for key in KEYS if split_of(key, 0.3) is Split.VALIDATION}
    assert small < large


@pytest.mark.parametrize(("fraction", "split"), [(0.0, Split.TRAIN), (1.0, Split.VALIDATION)])
def test_the_extreme_fractions_put_everything_on_one_side(fraction: float, split: Split):
    assert {split_of(key, fraction) for key in KEYS} == {split}


def test_a_key_keeps_its_side_from_one_version_to_the_next():
    assert [key for key in KEYS[:40] if split_of(key, 0.1) is Split.VALIDATION] == ["000036", "000038"]


@pytest.mark.parametrize(
    ("samples", "fraction"), [(30, 0.0001), (30, 0.0), (3, 0.01), (30, 1.0), (3, 0.9), (1000, 0.0), (17, 0.999)]
)
def test_a_split_that_is_too_small_is_refused_with_a_fraction_that_works(samples: int, fraction: float):
    positions = [split_position(f"{number:09d}") for number in range(samples)]
    with pytest.raises(UserError, match=r"data\.validation_fraction=.* holds out \d+ of \d+") as caught:
        check_split_sizes(positions, fraction)
    named = re.search(r"set data\.validation_fraction=([0-9.e-]+),", str(caught.value))
    assert named is not None
    check_split_sizes(positions, float(named[1]))


@pytest.mark.parametrize("positions", [[], [0.3], [0.3, 0.4], [0.3] * 10])
def test_too_few_samples_for_two_sides_are_refused(positions: list[float]):
    with pytest.raises(UserError, match="give more samples"):
        check_split_sizes(positions, 0.1)
