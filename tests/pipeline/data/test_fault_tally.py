import pytest

from pipeline.data.decode import DecodeFault
from pipeline.data.faults import MIN_SAMPLES, FaultTally, check_left_out, too_many_faults
from pipeline.data.summary import ShardEntry
from pipeline.errors import UserError


def shard(name: str, samples: int, **left_out: int) -> ShardEntry:
    return ShardEntry(name, 1, 0, samples, {}, left_out, {})


def test_good_samples_leave_no_trace_in_the_metrics():
    tally = FaultTally()
    tally.add(100, {})
    assert tally.metrics() == {}


def test_faults_are_counted_by_reason():
    tally = FaultTally()
    tally.add(100, {DecodeFault.BROKEN_IMAGE: 2})
    tally.add(100, {DecodeFault.BROKEN_IMAGE: 1, DecodeFault.EMPTY_CAPTION: 4})
    assert tally.metrics() == {"data/faulty": 7, "data/faulty_broken_image": 3, "data/faulty_empty_caption": 4}


def test_a_share_is_judged_once_enough_was_read():
    tally = FaultTally(MIN_SAMPLES - 1, {"broken_image": MIN_SAMPLES - 1})
    assert not tally.is_over(0.05)
    tally.add(1, {})
    assert tally.is_over(0.05)
    assert not tally.is_over(1.0)


def test_the_error_names_the_three_worst_shards_and_the_setting():
    tally = FaultTally(1000, {"broken_image": 90, "empty_image": 10})
    error = too_many_faults(tally, 0.05, {"a.tar": 10, "b.tar": 70, "c.tar": 1, "d.tar": 19})
    assert str(error) == (
        "100 of 1,000 samples cannot be used (90 broken_image, 10 empty_image), most in b.tar (70), d.tar (19), "
        "a.tar (10); replace these shards, or allow more than trainer.max_faulty_share=0.05"
    )


def test_shards_with_too_many_incomplete_samples_are_refused():
    good = shard("good.tar", 900)
    check_left_out([good, shard("b.tar", 95, missing_caption=5)], 0.05)
    with pytest.raises(UserError, match=r"100 of 1,050 .*missing_caption.*most in bad\.tar"):
        check_left_out([good, shard("bad.tar", 50, missing_caption=100)], 0.05)
