import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.mixing import mix, sample_seed
from pipeline.data.order import GlobalBatches
from pipeline.data.splits import check_batches_are_distinct
from pipeline.errors import UserError

SAMPLES = np.arange(1, 1001, 2, dtype=np.int64)
SHARD = (np.arange(1001) // 50).astype(np.int32)


def epoch_order(
    samples: NDArray[np.int64], shard: NDArray[np.int32], seed: int, epoch: int, shards_per_block: int = 32
) -> NDArray[np.int64]:
    """One epoch: a global batch of as many samples as there are."""
    return GlobalBatches(samples, shard, seed, len(samples), shards_per_block).batch(epoch)[1]


def whole_epoch_at_once(seed: int, epoch: int, shards_per_block: int) -> list[int]:
    """The order by its definition, one sort over all samples."""
    shards = sorted({int(SHARD[sample]) for sample in SAMPLES})
    shuffled = sorted(shards, key=lambda shard: int(sample_seed(seed, epoch, np.array([-1 - shard]))[0]))
    block = {shard: place // shards_per_block for place, shard in enumerate(shuffled)}
    draw = dict(zip(SAMPLES.tolist(), sample_seed(seed, epoch, SAMPLES).tolist(), strict=True))
    return sorted(SAMPLES.tolist(), key=lambda sample: (block[int(SHARD[sample])], draw[sample]))


@pytest.mark.parametrize("shards_per_block", [1, 3, 4, 100])
def test_blocks_made_one_by_one_are_the_order_of_the_whole_epoch(shards_per_block: int):
    for epoch in (0, 3):
        order = epoch_order(SAMPLES, SHARD, 2, epoch, shards_per_block)
        assert order.tolist() == whole_epoch_at_once(2, epoch, shards_per_block)


def test_batches_name_the_shards_that_are_read_now_and_next():
    batches = GlobalBatches(SAMPLES, SHARD, seed=4, global_batch_size=25, shards_per_block=4)
    for k in (0, 3, 4, 19, 20):
        here, following = batches.shards_after(k)
        assert int(SHARD[batches.batch(k)[1][0]]) in here
        assert {int(shard) for shard in SHARD[batches.batch(k // 4 * 4 + 4)[1]]} <= set(following)


def test_an_epoch_holds_every_sample_exactly_once():
    order = epoch_order(SAMPLES, SHARD, seed=3, epoch=5, shards_per_block=4)
    np.testing.assert_array_equal(np.sort(order), SAMPLES)


def test_the_order_follows_from_seed_and_epoch():
    orders = {
        (seed, epoch): epoch_order(SAMPLES, SHARD, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == 6
    assert orders[1, 2] == epoch_order(SAMPLES, SHARD, 1, 2).tolist()


def test_a_block_of_shards_is_read_to_its_end_before_the_next_one():
    order = epoch_order(SAMPLES, SHARD, seed=0, epoch=0, shards_per_block=4)
    blocks = [frozenset(SHARD[order[start : start + 100]]) for start in range(0, len(order), 100)]
    assert [len(block) for block in blocks] == [4, 4, 4, 4, 4]
    assert len(frozenset().union(*blocks)) == 20


def test_inside_a_block_the_shards_are_mixed():
    order = epoch_order(SAMPLES, SHARD, seed=0, epoch=0, shards_per_block=20)
    first = np.bincount(SHARD[order[:250]], minlength=20)
    assert (first > 0).all()
    assert (first < 25).all()


def test_neighbours_do_not_stay_together():
    order = epoch_order(SAMPLES, np.zeros(1001, np.int32), seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.15


@pytest.mark.parametrize("size", [7, 100, 499, 500, 501, 1300])
def test_global_batches_cut_the_endless_stream_of_epochs(size: int):
    batches = GlobalBatches(SAMPLES, SHARD, seed=9, global_batch_size=size, shards_per_block=4)
    stream = np.concatenate([epoch_order(SAMPLES, SHARD, 9, epoch, 4) for epoch in range(12)])
    epochs = np.repeat(np.arange(12), len(SAMPLES))
    for k in (0, 1, 2, 3, 0):
        epoch, sample = batches.batch(k)
        np.testing.assert_array_equal(sample, stream[k * size : (k + 1) * size])
        np.testing.assert_array_equal(epoch, epochs[k * size : (k + 1) * size])


def distinct_stream(size: int, epochs: int) -> list[int]:
    """The stream by its definition: whoever was shown in the batch already is put off to right behind it."""
    stream: list[int] = []
    for epoch in range(epochs):
        waiting = epoch_order(SAMPLES, SHARD, 9, epoch, 4).tolist()
        in_batch = set(stream[len(stream) - len(stream) % size :])
        head = waiting[:size] if in_batch else []
        first = [sample for sample in head if sample not in in_batch][: size - len(in_batch)]
        stream += [*first, *(sample for sample in head if sample not in first), *waiting[len(head) :]]
    return stream


@pytest.mark.parametrize("size", [1, 7, 30, 99, 100, 249, 250])
def test_no_batch_holds_a_sample_twice_and_every_epoch_holds_each_once(size: int):
    batches = GlobalBatches(SAMPLES, SHARD, seed=9, global_batch_size=size, shards_per_block=4)
    epochs = 9
    count = epochs * len(SAMPLES) // size
    samples = [batches.batch(k).sample for k in range(count)]
    assert all(len(set(batch.tolist())) == size for batch in samples)
    assert np.concatenate(samples).tolist() == distinct_stream(size, epochs)[: count * size]
    passes = np.concatenate([batches.batch(k).number_of_pass for k in range(count)])
    np.testing.assert_array_equal(passes, np.repeat(np.arange(epochs), len(SAMPLES))[: count * size])
    fresh = GlobalBatches(SAMPLES, SHARD, seed=9, global_batch_size=size, shards_per_block=4)
    for k in (count - 1, count // 2):
        np.testing.assert_array_equal(fresh.batch(k).sample, samples[k])


@pytest.mark.parametrize(("samples", "size"), [(64, 64), (64, 32), (100, 50), (101, 50), (192, 64)])
def test_enough_samples_for_batches_without_repetition_are_taken(samples: int, size: int):
    check_batches_are_distinct(samples, size, "stage.clip.global_batch_size")


@pytest.mark.parametrize(("samples", "size", "remedy"), [(30, 64, "15"), (65, 64, "32"), (99, 50, "49")])
def test_too_few_samples_for_batches_without_repetition_are_refused_with_a_size_that_works(
    samples: int, size: int, remedy: str
):
    key = "stage.clip.global_batch_size"
    with pytest.raises(UserError, match=rf"{key}={size} with {samples} training samples: .*set {key}={remedy} or less"):
        check_batches_are_distinct(samples, size, key)
    check_batches_are_distinct(samples, int(remedy), key)


def test_splitmix_agrees_with_its_published_sequence():
    # The first outputs of java.util.SplittableRandom and of the reference C code for the state 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * golden) % 2**64 for step in range(3)], np.uint64)
    assert mix(states).tolist() == expected


def test_sample_seeds_differ_by_seed_epoch_and_sample():
    seeds = np.concatenate([sample_seed(seed, epoch, SAMPLES) for seed in (0, 1) for epoch in (0, 1, 2)])
    assert len(np.unique(seeds)) == 6 * len(SAMPLES)


def test_a_seed_does_not_depend_on_the_batch_it_is_computed_in():
    epoch = np.arange(500, dtype=np.int64) % 3
    together = sample_seed(7, epoch, SAMPLES)
    alone = [int(sample_seed(7, int(e), np.array([s]))[0]) for e, s in zip(epoch, SAMPLES, strict=True)]
    assert together.tolist() == alone
