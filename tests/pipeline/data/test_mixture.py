"""Sources with weights in one epoch."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from pipeline.data.mixture import Mixture
from pipeline.data.order import GlobalBatches, epoch_samples

SHARD = np.repeat(np.arange(9), [5, 3, 7, 4, 4, 6, 10, 1, 2]).astype(np.int32)
SAMPLES = np.flatnonzero(np.arange(len(SHARD)) % 7 != 3)
SOURCE_OF_SHARD = (0, 0, 0, 0, 1, 1, 1, 1, 1)


def source_of(sample: int) -> int:
    return SOURCE_OF_SHARD[SHARD[sample]]


def mixed(*weights: str, size: int = 1, seed: int = 3) -> GlobalBatches:
    mixture = Mixture(SOURCE_OF_SHARD, tuple(map(Fraction, weights)))
    return GlobalBatches(SAMPLES, SHARD, seed, size, shards_per_block=2, mixture=mixture)


def showings(batches: GlobalBatches, count: int) -> list[tuple[int, int]]:
    """(pass, sample) of the first showings, from batches of one sample."""
    shown = [batches.batch(k) for k in range(count)]
    return [(int(each.number_of_pass[0]), int(each.sample[0])) for each in shown]


def in_source(source: int) -> int:
    return sum(source_of(int(sample)) == source for sample in SAMPLES)


def test_weights_of_one_are_the_order_without_weights():
    plain = GlobalBatches(SAMPLES, SHARD, 3, 8, shards_per_block=2)
    weighted = mixed("1", "1", size=8)
    for k in range(20):
        np.testing.assert_array_equal(plain.batch(k), weighted.batch(k))


@pytest.mark.parametrize(
    "weights", [("1", "1"), ("2", "1"), ("1", "1/2"), ("0.3", "1"), ("2.5", "0.1"), ("1/3", "3/7"), ("1", "1000")]
)
def test_after_any_number_of_epochs_each_sample_was_shown_as_often_as_its_weight_says(weights: tuple[str, str]):
    mixture = Mixture(SOURCE_OF_SHARD, tuple(map(Fraction, weights)))
    epochs = 3 if "1000" in weights else 10
    total = sum(in_source(source) * epochs * Fraction(weight) // 1 for source, weight in enumerate(weights))
    batches = GlobalBatches(SAMPLES, SHARD, 3, int(total), shards_per_block=2, mixture=mixture)
    shown = batches.batch(0)
    times = Counter(shown.sample.tolist())
    for sample in SAMPLES.tolist():
        due = epochs * Fraction(weights[source_of(sample)])
        assert int(due) <= times[sample] <= -int(-due // 1), sample


def test_each_showing_of_a_sample_is_another_pass():
    ten_epochs = 25 * in_source(0) + 4 * in_source(1)
    shown = showings(mixed("2.5", "0.4"), ten_epochs)
    assert len(set(shown)) == len(shown)
    passes: dict[int, list[int]] = {}
    for number, sample in shown:
        passes.setdefault(sample, []).append(number)
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in passes.values())


def test_an_epoch_has_the_sources_in_the_proportion_of_their_weights():
    batches = mixed("2", "1/2")
    mixture = Mixture(SOURCE_OF_SHARD, (Fraction(2), Fraction(1, 2)))
    length = mixture.rounds * epoch_samples(SAMPLES, SHARD, mixture)
    sources = Counter(source_of(sample) for _, sample in showings(batches, length))
    assert sources[0] == 2 * in_source(0)
    assert sources[1] == in_source(1) // 2


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_any_batch_is_found_at_once_and_is_the_same_piece_of_the_stream(size: int):
    stream = np.array(showings(mixed("1.5", "0.7"), 400)).T
    batches = mixed("1.5", "0.7", size=size)
    for k in (5, 0, 7, 2):
        shown = batches.batch(k)
        if size == 1:
            np.testing.assert_array_equal(shown, stream[:, k : k + 1])
        assert len(shown.sample) == size
        again = mixed("1.5", "0.7", size=size).batch(k)
        np.testing.assert_array_equal(shown, again)


def test_a_source_that_an_epoch_shows_in_part_does_not_begin_with_what_is_named_first():
    first = {int(SHARD[sample]) for _, sample in showings(mixed("1/4", "1/4", seed=3), 8)}
    other = {int(SHARD[sample]) for _, sample in showings(mixed("1/4", "1/4", seed=8), 8)}
    assert first != other


def test_the_shards_that_are_read_next_are_named_for_weighted_sources_too():
    batches = mixed("1/50", "1/50", size=1)
    for k in range(12):
        here, following = batches.shards_after(k)
        assert int(SHARD[batches.batch(k).sample[0]]) in here
        assert following


@pytest.mark.parametrize("weights", [("2", "1"), ("3", "1/3"), ("1.5", "1"), ("7", "5")])
def test_no_batch_holds_a_sample_twice_whatever_the_weights(weights: tuple[str, str]):
    mixture = Mixture(SOURCE_OF_SHARD, tuple(map(Fraction, weights)))
    size = epoch_samples(SAMPLES, SHARD, mixture) // 2 - 1
    batches = mixed(*weights, size=size)
    assert all(len(set(batches.batch(k).sample.tolist())) == size for k in range(60))


def test_a_mixture_survives_as_json():
    mixture = Mixture((0, 0, 1), (Fraction("0.1"), Fraction(3)))
    assert Mixture.of_json(mixture.as_json()) == mixture
