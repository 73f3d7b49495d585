from pipeline.launch.slurm.lanes import Lanes


def put(lanes: Lanes, job_id: int, *after: int, minutes: float = 10.0) -> int | None:
    ids = list(map(str, after))
    lane = lanes.choose(ids, minutes)
    lanes.add(lane, str(job_id), ids, minutes)
    return lane


def test_without_a_limit_there_are_no_lanes():
    lanes = Lanes(None)
    lanes.occupy(None, "1")
    assert put(lanes, 2) is None


def test_independent_jobs_fill_all_lanes_before_they_queue_up():
    lanes = Lanes(3)
    assert sorted(lane for job in range(3) if (lane := put(lanes, job)) is not None) == [0, 1, 2]
    again = put(lanes, 3)
    assert again is not None
    assert len(lanes.jobs_of(again)) == 2


def test_a_job_that_has_to_wait_leaves_the_idle_lane_to_others():
    lanes = Lanes(2)
    first = put(lanes, 1, minutes=60)
    assert put(lanes, 2, 1) == first
    assert put(lanes, 3, minutes=60) != first


def test_a_long_lane_is_avoided():
    lanes = Lanes(2)
    long = put(lanes, 1, minutes=100)
    short = put(lanes, 2, minutes=10)
    assert [put(lanes, job, minutes=10) for job in range(3, 8)] == [short] * 5
    assert long != short


def test_jobs_of_an_earlier_submission_keep_their_lane_and_are_waited_for():
    lanes = Lanes(2)
    lanes.occupy(1, "7")
    lanes.occupy(0, "8")
    lanes.occupy(3, "9")
    assert list(lanes.jobs_of(1)) == ["7", "9"]
    assert list(lanes.jobs_of(0)) == ["8"]
