from pathlib import Path

from pipeline.store.collect import pin
from pipeline.store.removable import measured
from pipeline.store.usage import usage_of
from tests.support.stores import finish, key_of, record, there


def test_what_runs_hold_share_and_have_alone_adds_up(tmp_path: Path):
    runs = {"mu.0": ("mu", 0.1), "mu.1": ("mu", 0.9), "same": (None, 0.1)}
    for name, (group, weight) in runs.items():
        finish(
            stage
            for stage in record(tmp_path, name, group, weight=weight).values()
            if key_of(stage) not in there(tmp_path)
        )
    pin(tmp_path, "same", is_pinned=True)
    usage = usage_of(tmp_path)
    by_name = {each.name: each for each in (*usage.runs, *usage.sweeps)}
    assert {name: (each.runs, each.stages, each.is_pinned) for name, each in by_name.items()} == {
        "mu.0": (1, 6, False),
        "mu.1": (1, 6, False),
        "same": (1, 6, True),
        "mu": (2, 8, False),
    }
    folder = measured(tmp_path / "runs" / "same").size_bytes
    assert by_name["same"].alone_bytes == folder
    assert by_name["mu.1"].alone_bytes > by_name["mu.0"].alone_bytes
    assert by_name["mu"].bytes + folder == sum(
        measured(path).size_bytes
        for path in [*tmp_path.glob("artifacts/*/*"), *tmp_path.glob("work/*/*"), *tmp_path.glob("runs/*")]
    )
    assert all(each.shared_bytes + each.alone_bytes == each.bytes for each in by_name.values())
    assert usage.total_bytes == measured(tmp_path).size_bytes


def test_what_no_run_needs_is_said_by_what_it_is(tmp_path: Path):
    finish(record(tmp_path, "first").values())
    record(tmp_path, "first", width=5)
    usage = usage_of(tmp_path)
    assert set(usage.rest) == {
        "artifact: run first has another config now",
        "work folder: run first has another config now",
        "checkpoints: its stage is finished",
    }
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard.tar").write_bytes(bytes(10_000))
    (tmp_path / ".trash" / "left").mkdir(parents=True)
    assert {"copies of remote shards", "trash of a gc that was stopped"} <= set(usage_of(tmp_path).rest)
