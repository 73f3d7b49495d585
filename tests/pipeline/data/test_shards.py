from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.data.shards import expand_shards, local_shard
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.FIRST_WAIT_S", 0.001)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("b.tar", "a.tar", "c.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_directory_stands_for_its_tars_in_order(shards: Path):
    assert expand_shards(str(shards), allow_shell_urls=False) == [str(shards / f"{name}.tar") for name in "abc"]


def test_a_brace_pattern_stands_for_the_shards_it_spells(shards: Path):
    assert expand_shards(f"{shards}/{{a,c}}.tar", allow_shell_urls=False) == [
        str(shards / "a.tar"),
        str(shards / "c.tar"),
    ]


def test_a_brace_pattern_of_a_url_is_spelled_out_without_a_look_at_the_network():
    expanded = expand_shards("https://example.org/{00..02}.tar", allow_shell_urls=False)
    assert expanded == [f"https://example.org/{number:02d}.tar" for number in range(3)]


def test_a_file_url_is_a_path(shards: Path):
    assert expand_shards(f"file://{shards}/a.tar", allow_shell_urls=False) == [str(shards / "a.tar")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/nowhere/a.tar", r"data\.shards: /nowhere/a\.tar does not exist"),
        ("/nowhere/{0..3}.tar", r"data\.shards: /nowhere/0\.tar does not exist \(4 of 4 missing\)"),
        ("/nowhere/{0..3.tar", r"data\.shards: .* brace"),
        ("pipe:cat a.tar", r"data\.shards: pipe:cat a\.tar would run a shell command; set data\.allow_shell_urls=true"),
        ("PIPE:cat a.tar", r"data\.shards: .* would run a shell command"),
        ("{pipe,http}:cat", r"data\.shards"),
        ("s3://bucket/a.tar", r"data\.shards: .* scheme s3, which is not opened"),
        ((), r"data\.shards names no shard"),
        (("https://a/0.tar", "https://a/0.tar"), r"data\.shards names https://a/0\.tar more than once"),
    ],
)
def test_shards_that_cannot_be_opened_are_refused_by_the_name_of_the_setting(value: str, message: str):
    with pytest.raises(UserError, match=message):
        expand_shards(value, allow_shell_urls=False)


def test_an_empty_directory_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.shards: .* holds no \*\.tar"):
        expand_shards(str(tmp_path), allow_shell_urls=False)


def test_a_pipe_is_passed_on_where_it_is_allowed():
    command = "pipe:cat a-{0..3}.tar"
    assert expand_shards(command, allow_shell_urls=True) == [command]


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
    monkeypatch.setattr("pipeline.data.shards.FIRST_WAIT_S", 0.04)
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
