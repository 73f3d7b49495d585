import pytest

from pipeline.data.splits import Split, split_of

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
