"""What each stage is given of a machine."""

from pathlib import Path

import pytest

from pipeline.launch.local.devices import Devices, Share, gpus_here, most_at_once
from pipeline.workflow.frozen import FrozenStage, Tasks
from tests.support.fakes import TRAINER, plan
from tests.support.halves import plan_halves

EIGHT = tuple(map(str, range(8)))


def stage(outputs: Path, **trainer: object) -> FrozenStage:
    frozen = plan(outputs)["clip"].frozen
    assert frozen is not None
    changed = {"accelerator": "auto", **trainer}
    return frozen.model_copy(update={"trainer": TRAINER.model_copy(update=changed)})


def test_eight_stages_on_eight_gpus_have_one_each_and_a_ninth_waits(tmp_path: Path):
    devices = Devices(8, EIGHT, cores=32)
    shares = [devices.take(stage(tmp_path)) for _ in range(8)]
    assert sorted(share.gpus for share in shares if share) == [(name,) for name in EIGHT]
    assert devices.take(stage(tmp_path)) is None
    assert shares[3] is not None
    assert devices.environment(shares[3], {}) == {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "4"}
    devices.give_back(shares[3])
    assert devices.take(stage(tmp_path)) == shares[3]


def test_a_stage_is_given_as_many_gpus_as_it_has_devices_and_others_only_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FrozenStage, "tasks", property(lambda self: Tasks(1, self.trainer.devices)))
    devices = Devices(8, EIGHT, cores=8)
    assert devices.take(stage(tmp_path, devices=6)) == Share(6, EIGHT[:6])
    assert devices.take(stage(tmp_path, devices=4)) is None
    assert devices.take(stage(tmp_path, devices=2)) == Share(2, ("6", "7"))


def test_one_place_has_all_gpus_and_sets_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FrozenStage, "tasks", property(lambda self: Tasks(1, self.trainer.devices)))
    devices = Devices(1, EIGHT, cores=8)
    share = devices.take(stage(tmp_path, devices=8))
    assert share is not None
    assert share == Share(1, EIGHT)
    assert devices.take(stage(tmp_path)) is None
    assert devices.environment(share, {}) == {"CUDA_VISIBLE_DEVICES": ",".join(EIGHT)}


def test_more_places_than_gpus_share_them_evenly(tmp_path: Path):
    devices = Devices(4, ("0", "1"), cores=4)
    gpus = [share.gpus for _ in range(4) if (share := devices.take(stage(tmp_path)))]
    assert gpus == [("0",), ("1",), ("0",), ("1",)]


def test_there_is_room_until_every_place_is_taken_and_again_when_one_is_given_back(tmp_path: Path):
    devices = Devices(2, (), cores=2)
    first, second = devices.take(stage(tmp_path)), devices.take(stage(tmp_path))
    assert first is not None
    assert second is not None
    assert not devices.has_room
    devices.give_back(second)
    assert devices.has_room


def test_a_stage_on_the_cpu_takes_no_gpu(tmp_path: Path):
    devices = Devices(2, ("0",), cores=2)
    assert devices.take(stage(tmp_path, accelerator="cpu")) == Share(1, ())
    assert devices.take(stage(tmp_path)) == Share(1, ("0",))


def test_threads_that_somebody_chose_stay(tmp_path: Path):
    devices = Devices(2, (), cores=8)
    share = devices.take(stage(tmp_path))
    assert share is not None
    assert devices.environment(share, {"A": "b"}) == {"A": "b", "OMP_NUM_THREADS": "4"}
    assert devices.environment(share, {"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("visible", "gpus"), [("2,GPU-ab ", ("2", "GPU-ab")), ("", ()), ("-1", ()), (None, ("0", "1"))]
)
def test_gpus_are_those_that_cuda_may_see_by_the_names_it_knows(
    tmp_path: Path, visible: str | None, gpus: tuple[str, ...]
):
    for name in ("nvidia3", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpus_here(environment, tmp_path) == gpus


def test_as_many_stages_as_are_equally_far_from_the_start_can_run_at_once(tmp_path: Path):
    one = plan_halves(tmp_path, "a", {"left": {}, "right": {}})
    other = plan_halves(tmp_path, "b", {"middle": {}})
    assert most_at_once([one]) == 2
    assert most_at_once([one, other]) == 3


def test_a_wide_stage_takes_several_places_and_their_cores_unless_it_has_gpus_or_a_number_of_threads(tmp_path: Path):
    devices = Devices(4, (), cores=8, widths={"clip": 2, "decoder": 9})
    unset = {"cpu_threads": None}
    share = devices.take(stage(tmp_path, **unset))
    assert share is not None
    assert share == Share(2, (), width=2)
    assert devices.environment(share, {}) == {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "1000"}
    assert devices.environment(share, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "7"})["GOMP_SPINCOUNT"] == "7"
    decoder = stage(tmp_path, **unset).model_copy(update={"stage": "decoder"})
    assert devices.take(decoder) is None
    devices.give_back(share)
    assert devices.take(decoder) == Share(4, (), width=4)
    assert Devices(4, (), cores=8, widths={"clip": 2}).take(stage(tmp_path, cpu_threads=1)) == Share(1, ())
    assert Devices(4, ("0",), cores=8, widths={"clip": 2}).take(stage(tmp_path, **unset)) == Share(1, ("0",))
