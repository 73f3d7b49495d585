import errno
import multiprocessing
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import torch

from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import training_loader
from pipeline.data.place import ShardPlace
from pipeline.data.prefetch import ShardPrefetch
from pipeline.data.prepared import read_prepared
from pipeline.data.reader import SampleReader
from pipeline.data.remote import local_shard
from pipeline.data.s3 import fetch_object
from pipeline.data.shards import expand_shards
from pipeline.data.write import write_shards
from pipeline.errors import UserError
from tests.support.pictures import source_sample
from tests.support.s3_server import Fault, Front, bucket, request, s3_server
from tests.support.shards import update_index


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    monkeypatch.setattr("pipeline.data.remote.FIRST_WAIT_S", 0.001)
    with bucket(server, monkeypatch, tmp_path) as front:
        yield front


def kept(cache: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in cache.iterdir() if path.suffix != ".lock")


def put_shards(s3: Front, directory: Path, samples: int = 20) -> list[str]:
    """Put shards of ten samples into the bucket; gives their URLs."""
    for shard in write_shards(directory, map(source_sample, range(samples)), 10):
        s3.put(f"bucket/data/{shard.name}", (directory / shard.name).read_bytes())
    return [f"s3://bucket/data/{number:05d}.tar" for number in range(samples // 10)]


def test_shards_are_indexed_and_read_through_the_cache_and_streamed_once(s3: Front, tmp_path: Path):
    put_shards(s3, tmp_path / "source")
    urls = expand_shards("s3://bucket/data/{00000..00001}.tar", allow_shell_urls=False)
    directory, index = update_index(urls, tmp_path / "cache")
    assert directory.parent == tmp_path / "cache"
    assert [shard.name for shard in index.shards] == urls
    reader = SampleReader(index, directory, tmp_path / "cache")
    assert [reader.caption(row) for row in range(20)] == [f"picture {row}" for row in range(20)]
    assert sorted(s3.fetched) == ["/bucket/data/00000.tar", "/bucket/data/00001.tar"]


def test_many_who_ask_for_a_shard_at_once_stream_it_once(s3: Front, tmp_path: Path):
    s3.put("bucket/a.tar", b"a" * 100_000)
    askers = [
        threading.Thread(target=local_shard, args=("s3://bucket/a.tar", tmp_path / "cache"), daemon=True)
        for _ in range(4)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(20)
    assert kept(tmp_path / "cache") == [b"a" * 100_000]
    assert s3.fetched == ["/bucket/a.tar"]


def test_a_full_cache_gives_up_objects_as_it_does_other_shards(s3: Front, tmp_path: Path):
    for name in "abc":
        s3.put(f"bucket/{name}.tar", name.encode() * 1000)
        local_shard(f"s3://bucket/{name}.tar", tmp_path / "cache", 2000)
    assert kept(tmp_path / "cache") == [b"b" * 1000, b"c" * 1000]


@pytest.mark.parametrize("fault", Fault)
def test_a_transfer_that_breaks_is_tried_again_until_it_is_whole(s3: Front, tmp_path: Path, fault: Fault):
    s3.put("bucket/a.tar", b"a" * 300_000)
    s3.faults = [fault, fault]
    assert local_shard("s3://bucket/a.tar", tmp_path / "cache", None, 300_000).read_bytes() == b"a" * 300_000
    assert s3.fetched == ["/bucket/a.tar"] * 3


@pytest.mark.parametrize("fault", [Fault.SERVER_ERROR, Fault.RESET])
def test_a_transfer_that_breaks_each_time_ends_in_one_line_and_leaves_nothing(s3: Front, tmp_path: Path, fault: Fault):
    s3.put("bucket/a.tar", b"a" * 1000)
    s3.faults = [fault] * 20
    with pytest.raises(UserError, match=r"data\.shards: s3://bucket/a\.tar cannot be read after 5 attempts") as failure:
        local_shard("s3://bucket/a.tar", tmp_path / "cache")
    assert "\n" not in str(failure.value)
    assert len(s3.fetched) == (10 if fault is Fault.RESET else 5)  # aiohttp asks again at once where it is hung up on
    assert kept(tmp_path / "cache") == []


def test_an_object_of_another_size_than_the_index_says_is_refused(s3: Front, tmp_path: Path):
    s3.put("bucket/a.tar", b"a" * 1000)
    with pytest.raises(UserError, match=r"1000 bytes, and 999 when it was indexed; put it back, or run .*--again"):
        local_shard("s3://bucket/a.tar", tmp_path / "cache", None, 999)
    assert len(s3.fetched) == 1
    assert kept(tmp_path / "cache") == []


def test_a_server_that_cannot_be_reached_is_tried_again(s3: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"s3://bucket/a\.tar cannot be read after 5 attempts \(EndpointConnection"):
        local_shard("s3://bucket/a.tar", tmp_path / "cache")


def refused_at_once(s3: Front, url: str, cache: Path, match: str, requests: int = 1) -> None:
    with pytest.raises(UserError, match=match) as failure:
        local_shard(url, cache)
    assert str(failure.value).startswith(f"data.shards: {url} ")
    assert "\n" not in str(failure.value)
    assert len(s3.fetched) == requests
    assert kept(cache) == []


def test_a_missing_object_is_named_at_once(s3: Front, tmp_path: Path):
    refused_at_once(s3, "s3://bucket/no.tar", tmp_path / "cache", r"does not exist \(NoSuchKey: .*give shards")


def test_a_missing_bucket_is_named_at_once(s3: Front, tmp_path: Path):
    refused_at_once(s3, "s3://nowhere/a.tar", tmp_path / "cache", r"does not exist \(NoSuchBucket: .*give shards")


def test_credentials_that_the_server_does_not_know_are_refused_at_once(s3: Front, server: int, tmp_path: Path):
    s3.put("bucket/a.tar")
    assert request(server, "POST", "/moto-api/reset-auth", b"0")[0] == 200
    try:
        refused_at_once(
            s3, "s3://bucket/a.tar", tmp_path / "cache", r"may not be read \(InvalidAccessKeyId: .*set AWS_PROFILE"
        )
    finally:
        assert request(server, "POST", "/moto-api/reset-auth", b"inf")[0] == 200


def test_a_private_object_is_not_read_without_a_login(s3: Front, tmp_path: Path):
    s3.put("bucket/a.tar")
    fsspec.config.conf["s3"]["anon"] = True  # as FSSPEC_S3_ANON=true does
    refused_at_once(
        s3,
        "s3://bucket/a.tar",
        tmp_path / "cache",
        r"may not be read or does not exist \(403: Forbidden\); .*FSSPEC_S3_ANON=true",
    )


def test_missing_credentials_are_asked_for(s3: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused_at_once(s3, "s3://bucket/a.tar", tmp_path / "cache", r"NoCredentialsError: .*set AWS_PROFILE, or", 0)


@pytest.mark.parametrize(("variable", "value"), [("AWS_PROFILE", "nobody"), ("AWS_ENDPOINT_URL", "nonsense")])
def test_an_environment_that_cannot_be_used_is_told_in_one_line(
    s3: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    monkeypatch.setenv(variable, value)
    refused_at_once(s3, "s3://bucket/a.tar", tmp_path / "cache", "cannot be read", 0)


def test_options_that_s3fs_does_not_know_are_told_in_one_line(s3: Front, tmp_path: Path):
    fsspec.config.conf["s3"]["nonsense"] = 1
    refused_at_once(s3, "s3://bucket/a.tar", tmp_path / "cache", r"cannot be read \(TypeError: .*nonsense", 0)


def test_a_full_disk_stays_one(s3: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s3.put("bucket/a.tar", b"a" * 1000)
    monkeypatch.setattr("pipeline.data.remote.fetch_object", lambda url, _: fetch_object(url, Path("/dev/full")))
    with pytest.raises(OSError, match="No space left") as failure:
        local_shard("s3://bucket/a.tar", tmp_path / "cache")
    assert failure.value.errno == errno.ENOSPC
    assert len(s3.fetched) == 1


def test_without_s3fs_the_remedy_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/a\.tar needs s3fs .*`pip install -e '\.\[s3\]'`"):
        local_shard("s3://bucket/a.tar", tmp_path / "cache")


def test_a_directory_stands_for_its_tars_in_order(s3: Front, tmp_path: Path):
    for name in ("data/b.tar", "data/a.tar", "data/notes.txt", "data/below/c.tar", "data.tar", "other/d.tar"):
        s3.put(f"bucket/{name}", b"x")
    assert expand_shards("s3://bucket/data/", allow_shell_urls=False) == [
        "s3://bucket/data/a.tar",
        "s3://bucket/data/b.tar",
    ]
    assert expand_shards("s3://bucket/", allow_shell_urls=False) == ["s3://bucket/data.tar"]
    assert expand_shards("s3://bucket/{other,data/below}/", allow_shell_urls=False) == [
        "s3://bucket/other/d.tar",
        "s3://bucket/data/below/c.tar",
    ]


def test_a_version_of_an_object_can_be_named(s3: Front, tmp_path: Path):
    versioning = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"
    s3.put("bucket?versioning", versioning)
    first = s3.put("bucket/a.tar", b"first")["x-amz-version-id"]
    s3.put("bucket/a.tar", b"second")
    assert local_shard(f"s3://bucket/a.tar?versionId={first}", tmp_path / "cache").read_bytes() == b"first"
    assert local_shard("s3://bucket/a.tar", tmp_path / "cache").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/empty/", r"data\.shards: s3://bucket/empty/ holds no \*\.tar"),
        ("s3://bucket/", r"data\.shards: s3://bucket/ holds no \*\.tar"),
        ("s3://nowhere/data/", r"data\.shards: s3://nowhere/data/ does not exist \(NoSuchBucket"),
    ],
)
def test_a_directory_without_shards_is_refused(s3: Front, url: str, message: str):
    with pytest.raises(UserError, match=message):
        expand_shards(url, allow_shell_urls=False)


def in_the_bucket(s3: Front, prepared: Path, cache_dir: Path, shards_put: int = 5) -> ShardPlace:
    """The five shards of a data artifact as objects, of which the first are in the bucket."""
    shards = read_prepared(prepared).index.shards
    for shard in shards[:shards_put]:
        s3.put(f"bucket/{shard.name}", (prepared / "shards" / shard.name).read_bytes())
    return ShardPlace(shards=tuple(f"s3://bucket/{shard.name}" for shard in shards), cache_dir=cache_dir)


def test_shards_are_fetched_ahead(s3: Front, prepared: Path, tmp_path: Path):
    reader = read_prepared(prepared, in_the_bucket(s3, prepared, tmp_path / "cache")).reader
    prefetch = ShardPrefetch(reader)
    assert prefetch.is_needed
    prefetch.want([3, 1, 0, 2])
    prefetch.wait()
    assert sorted(s3.fetched) == [f"/bucket/0000{number}.tar" for number in range(4)]
    reader.fetch(1)
    assert len(s3.fetched) == 4


def test_a_shard_that_cannot_be_fetched_ahead_is_left_to_the_reader(
    s3: Front, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reader = read_prepared(prepared, in_the_bucket(s3, prepared, tmp_path / "cache", shards_put=2)).reader
    prefetch = ShardPrefetch(reader)
    prefetch.want([2])
    prefetch.wait()
    assert "warning: s3://bucket/00002.tar was not fetched ahead" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        reader.fetch(2)


def _fetch_and_exit(url: str, cache: Path) -> None:
    sys.exit(0 if local_shard(url, cache).read_bytes() == b"b" * 1000 else 1)


def test_a_forked_process_reads_while_its_parent_is_reading(s3: Front, tmp_path: Path):
    s3.put("bucket/a.tar", b"a" * 1000)
    s3.put("bucket/b.tar", b"b" * 1000)
    assert expand_shards("s3://bucket/", allow_shell_urls=False) == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    s3.held.clear()
    parent = threading.Thread(target=local_shard, args=("s3://bucket/a.tar", tmp_path / "cache"), daemon=True)
    parent.start()
    while not s3.fetched:
        parent.join(0.01)
    child = multiprocessing.get_context("fork").Process(
        target=_fetch_and_exit, args=("s3://bucket/b.tar", tmp_path / "cache"), daemon=True
    )
    child.start()
    s3.held.set()
    child.join(20)
    parent.join(20)
    assert child.exitcode == 0
    assert kept(tmp_path / "cache") == [b"a" * 1000, b"b" * 1000]


def test_training_on_objects_gives_the_batches_of_local_files(s3: Front, prepared: Path, tmp_path: Path):
    options: dict[str, Any] = {
        "seed": 5,
        "global_batch_size": 24,
        "micro_batch_size": 24,
        "rank": 0,
        "world_size": 1,
        "first_batch": 0,
        "batches": 4,
    }
    remote = CaptionedImages(prepared, 4, place=in_the_bucket(s3, prepared, tmp_path / "cache"))
    remote.data.reader.fetch(0)  # so that S3 was used before the worker is forked
    s3.faults = [Fault.CUT, Fault.SERVER_ERROR]
    local = list(training_loader(CaptionedImages(prepared, 4), workers=0, **options))
    streamed = list(training_loader(remote, workers=1, **options))
    assert [batch.caption for batch in streamed] == [batch.caption for batch in local]
    assert all(torch.equal(one.image, other.image) for one, other in zip(streamed, local, strict=True))
    assert len(s3.fetched) == 5 + 2
