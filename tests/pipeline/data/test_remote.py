from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.data.remote import local_shard
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.remote.FIRST_WAIT_S", 0.001)


def test_a_remote_shard_is_streamed_once_and_then_taken_from_the_cache(tmp_path: Path):
    source = tmp_path / "source.tar"
    source.write_bytes(b"first")
    url = f"pipe:cat {source}"
    cached = local_shard(url, tmp_path / "cache")
    source.write_bytes(b"second")
    assert local_shard(url, tmp_path / "cache") == cached
    assert cached.read_bytes() == b"first"


def test_a_flaky_transfer_is_tried_again_until_it_is_whole(tmp_path: Path):
    fails_twice = f"pipe:echo >> {tmp_path}/tries; printf half; test $(wc -l < {tmp_path}/tries) -gt 2"
    assert local_shard(fails_twice, tmp_path / "cache").read_bytes() == b"half"
    assert (tmp_path / "tries").read_bytes() == b"\n\n\n"


def test_the_waits_between_attempts_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.data.remote.FIRST_WAIT_S", 0.04)
    with pytest.raises(UserError, match="after 5 attempts"):
        local_shard(f"pipe:date +%s%N >> {tmp_path}/times; exit 7", tmp_path / "cache")
    times = [int(line) / 1e9 for line in (tmp_path / "times").read_text().splitlines()]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert all(wait >= 0.04 * 2**number for number, wait in enumerate(waits))
    assert len(waits) == 4


def test_a_broken_transfer_leaves_no_shard_in_the_cache(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.shards: pipe:.* cannot be read"):
        local_shard("pipe:printf half; exit 7", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_local_shard_is_used_where_it_lies(tmp_path: Path):
    assert local_shard(str(tmp_path / "a.tar"), tmp_path / "cache") == tmp_path / "a.tar"


def remote(tmp_path: Path, name: str, size: int = 1000) -> str:
    (tmp_path / name).write_bytes(name.encode() * (size // len(name)))
    return f"pipe:cat {tmp_path / name}"


def kept(cache: Path) -> set[str]:
    return {path.read_bytes()[:1].decode() for path in cache.iterdir() if path.suffix != ".lock"}


def test_a_full_cache_gives_up_what_was_asked_for_the_longest_ago(tmp_path: Path):
    cache = tmp_path / "cache"
    for name in "abc":
        local_shard(remote(tmp_path, name), cache, 3000)
    assert kept(cache) == {"a", "b", "c"}
    local_shard(remote(tmp_path, "a"), cache, 3000)
    local_shard(remote(tmp_path, "d"), cache, 3000)
    assert kept(cache) == {"a", "c", "d"}


def test_a_shard_that_is_removed_from_the_cache_is_read_to_its_end_by_who_has_it_open(tmp_path: Path):
    cache = tmp_path / "cache"
    with local_shard(remote(tmp_path, "a"), cache, 1000).open("rb") as first:
        local_shard(remote(tmp_path, "b"), cache, 1000)
        assert kept(cache) == {"b"}
        assert first.read() == b"a" * 1000
