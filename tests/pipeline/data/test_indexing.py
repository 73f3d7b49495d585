"""Indexing as a job: what it keeps, where it writes, what it says."""

import errno
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.cli import main
from pipeline.data.index import ShardIndex, read_index
from pipeline.data.indexing import IndexProgress, index_place
from pipeline.data.location import open_index, open_summary
from pipeline.data.place import ShardPlace
from pipeline.data.walk import walk_shard
from pipeline.data.write import write_shards
from pipeline.errors import UserError
from tests.support.pictures import png, source_sample, tar
from tests.support.shards import the_index


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are walked in this process."""
    names: list[str] = []
    monkeypatch.setattr(
        "pipeline.data.indexing.walk_shard", lambda path, name: (names.append(name), walk_shard(path, name))[1]
    )
    return names


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_processes_make_the_same_index(place: ShardPlace, tmp_path: Path, workers: int):
    the_index(place, workers)
    alone = read_index(tmp_path / "shards")
    again = the_index(place, workers, again=True)
    assert [alone.key(row) for row in range(20)] == [f"{row:05d}" for row in range(20)]
    assert again.shards == alone.shards


def test_progress_is_reported_shard_by_shard(place: ShardPlace):
    seen: list[IndexProgress] = []
    index_place(place, 0, seen.append)
    assert [(each.shards_done, each.samples) for each in seen] == [(n, 5 * n) for n in range(5)]
    assert {each.shards for each in seen} == {4}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_is_refused_does_not_cost_the_others(
    place: ShardPlace, tmp_path: Path, walked: list[str], workers: int, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "shards" / "00001.tar"
    good = broken.read_bytes()
    broken.write_bytes(b"no tar" * 1000)
    options = ["--workers", str(workers), "--cache", str(place.cache_dir)]
    assert main(["shards", "index", str(tmp_path / "shards"), *options]) == 2
    message = capsys.readouterr().err
    assert "00001.tar is no uncompressed tar" in message
    assert "the other shards are indexed, with 15 samples" in message
    assert len(read_index(tmp_path / "shards")) == 15
    broken.write_bytes(good)
    walked.clear()
    the_index(place)
    assert walked == ["00001.tar"]


@pytest.mark.parametrize(
    ("number", "of_sigint"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # as in the background of a shell
    ],
    ids=["SIGINT", "SIGTERM", "SIGTERM in the background"],
)
def test_an_indexing_that_is_stopped_keeps_what_it_walked(tmp_path: Path, number: signal.Signals, of_sigint: Any):
    write_shards(tmp_path / "shards", map(source_sample, range(8)), 2)
    code = (
        "import sys, time, pipeline.data.indexing as indexing\n"
        "walk = indexing.walk_shard\n"
        "def slowly(path, name):\n"
        "    if name == '00002.tar': print('reached', flush=True); time.sleep(60)\n"
        "    return walk(path, name)\n"
        "indexing.walk_shard = slowly\n"
        "from pipeline.cli import main\n"
        f"sys.exit(main(['shards', 'index', {str(tmp_path / 'shards')!r}, '--workers', '1']))"
    )
    before = signal.signal(signal.SIGINT, of_sigint)
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n"
    process.send_signal(number)
    assert process.wait(20) == 75
    kept = read_index(tmp_path / "shards")
    assert [shard.name for shard in kept.shards] == ["00000.tar", "00001.tar"]


def test_an_indexing_in_several_processes_that_is_stopped_ends_at_once(tmp_path: Path):
    write_shards(tmp_path / "shards", map(source_sample, range(8)), 2)
    code = (
        "import os, sys, time, pipeline.data.indexing as indexing\n"
        "walk = indexing.walk_shard\n"
        "def slowly(path, name):\n"
        # Whole lines: `print` of two processes at once writes their words first, and then their ends of line.
        "    if name >= '00002.tar': os.write(1, b'reached\\n'); time.sleep(60)\n"
        "    return walk(path, name)\n"
        "indexing.walk_shard = slowly\n"
        "from pipeline.cli import main\n"
        f"sys.exit(main(['shards', 'index', {str(tmp_path / 'shards')!r}, '--workers', '2']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n"
    assert process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert errors == "stopped; the shards that were walked are kept, and the same command goes on\n"
    assert [shard.name for shard in read_index(tmp_path / "shards").shards] == ["00000.tar", "00001.tar"]


def test_an_index_that_was_made_meanwhile_keeps_its_shards(place: ShardPlace, tmp_path: Path):
    def index_the_others(done: IndexProgress) -> None:
        if done.shards_done == 0:
            index_place(place.model_copy(update={"shards": (f"{tmp_path}/shards/{{00002..00003}}.tar",)}), 0)

    index_place(place.model_copy(update={"shards": (f"{tmp_path}/shards/{{00000..00001}}.tar",)}), 0, index_the_others)
    assert len(open_index(place)) == 20


def test_again_walks_what_has_not_changed_and_fetches_remote_shards_anew(tmp_path: Path, walked: list[str]):
    tar(tmp_path / "a.tar", {"0.png": png((1, 1, 1)), "0.txt": b"old"})
    place = ShardPlace(shards=(f"pipe:cat {tmp_path}/a.tar",), allow_shell_urls=True, cache_dir=tmp_path / "cache")
    the_index(place)
    tar(tmp_path / "a.tar", {"0.png": png((1, 1, 1)), "0.txt": b"new"})
    before = the_index(place).shards
    assert len(walked) == 1
    after = the_index(place, again=True).shards
    assert len(walked) == 2
    assert before[0].contents["image"] == after[0].contents["image"]
    assert before[0].contents["txt"] != after[0].contents["txt"]


def fail_to_write(monkeypatch: pytest.MonkeyPatch, directory: Path, number: int) -> None:
    write = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        if path.is_relative_to(directory):
            raise OSError(number, os.strerror(number), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_the_shards_directory_cannot_be_written_the_index_is_in_the_cache(
    place: ShardPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    fail_to_write(monkeypatch, tmp_path / "shards", number)
    (indexed,) = index_place(place, 0)
    assert indexed.directory.parent == tmp_path / "outputs" / "cache"
    assert len(open_index(place)) == 20
    assert len(open_summary(place).shards) == 4


def test_a_stale_index_that_cannot_be_written_again_does_not_stand_before_the_right_one(
    place: ShardPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    the_index(place)
    tar(tmp_path / "shards" / "00003.tar", {"x.png": png((1, 1, 1)), "x.txt": b"new"})
    with pytest.raises(UserError, match=r"00003\.tar changed since"):
        open_index(place)
    fail_to_write(monkeypatch, tmp_path / "shards", errno.EROFS)
    index_place(place, 0)
    index = open_index(place)
    assert [index.key(row) for row in range(len(index))][-1] == "x"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_a_full_disk(
    place: ShardPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    fail_to_write(monkeypatch, tmp_path / "shards", number)
    with pytest.raises(UserError, match=r"no space is left for the index in .*shards"):
        index_place(place, 0)


def test_a_full_cache_is_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tar(tmp_path / "a.tar", {"0.png": png((1, 1, 1)), "0.txt": b"red"})
    monkeypatch.setattr("pipeline.data.remote.shutil.copyfileobj", full)
    place = ShardPlace(shards=(f"pipe:cat {tmp_path}/a.tar",), allow_shell_urls=True, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=rf"no space is left for remote shards in {tmp_path}/cache; .*--cache-gib"):
        index_place(place, 0)


def test_the_advice_of_a_message_works_when_typed(tmp_path: Path):
    """Through a shell, with spaces and braces in the path and an index elsewhere."""
    directory = tmp_path / "my shards"
    write_shards(directory, map(source_sample, range(4)), 2)
    place = ShardPlace(
        shards=(f"{directory}/{{00000..00001}}.tar",), cache_dir=tmp_path / "a cache", index_dir=tmp_path / "an index"
    )
    with pytest.raises(UserError, match="unclip shards index") as caught:
        open_summary(place)
    command = str(caught.value).split("`")[1]
    python = f"{sys.executable} -m pipeline.cli"
    assert command.startswith("unclip ")
    subprocess.run(["bash", "-c", command.replace("unclip", python, 1)], check=True, stdout=subprocess.DEVNULL)
    assert open_summary(place).samples == 4


def test_what_a_directory_holds_beside_shards_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_shards(tmp_path, map(source_sample, range(2)), 2)
    write_shards(tmp_path / "below" / "deep", map(source_sample, range(2)), 1)
    for name in ("a.tar.gz", "b.tgz", "._00000.tar"):
        (tmp_path / name).write_bytes(b"x")
    assert main(["shards", "index", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "passed over 2 compressed tars" in said
    assert "passed over 1 AppleDouble files" in said
    assert "passed over 2 tars in sub-directories" in said
    assert "2 samples in 1 shards" in said


def test_a_pool_process_that_is_killed_is_told_in_a_line(place: ShardPlace, monkeypatch: pytest.MonkeyPatch):
    def kill(path: Path, name: str) -> ShardIndex:
        if name == "00003.tar":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return walk_shard(path, name)

    monkeypatch.setattr("pipeline.data.indexing.walk_shard", kill)
    with pytest.raises(UserError, match=r"a process that walked shards was killed.*--workers 1"):
        index_place(place, 2)


@pytest.mark.parametrize("name", ["index.json", "index.npz"])
def test_an_index_that_is_damaged_anywhere_is_refused_or_as_it_was(place: ShardPlace, tmp_path: Path, name: str):
    whole = the_index(place)
    path = tmp_path / "shards" / name
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        broken = bytearray(content)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            index = open_index(place)
        except UserError:
            continue
        assert index.renamed([shard.name for shard in whole.shards]).shards == whole.shards


def test_a_shard_that_cannot_be_read_does_not_cost_the_others(
    place: ShardPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def forbidden(path: Path, name: str) -> ShardIndex:
        if name == "00001.tar":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return walk_shard(path, name)

    monkeypatch.setattr("pipeline.data.indexing.walk_shard", forbidden)
    (indexed,) = index_place(place, 0)
    assert indexed.refused == (f"data.shards: {tmp_path}/shards/00001.tar cannot be read (Permission denied)",)
    assert len(read_index(tmp_path / "shards")) == 15


def test_processes_that_walk_shards_do_not_outlive_who_started_them(tmp_path: Path):
    write_shards(tmp_path / "shards", map(source_sample, range(4)), 2)
    code = (
        "import os, sys, time, pipeline.data.indexing as indexing\n"
        "def slowly(path, name): os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)\n"
        "indexing.walk_shard = slowly\n"
        "from pipeline.cli import main\n"
        f"sys.exit(main(['shards', 'index', {str(tmp_path / 'shards')!r}, '--workers', '2']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_shell_urls_are_indexed_where_that_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tar(tmp_path / "a.tar", {"0.png": png((1, 1, 1)), "0.txt": b"red"})
    url = f"pipe:cat {tmp_path}/a.tar"
    assert main(["shards", "index", url, "--cache", str(tmp_path / "cache")]) == 2
    assert "--allow-shell-urls for unclip shards" in capsys.readouterr().err
    place = ShardPlace(shards=(url,), allow_shell_urls=True, cache_dir=tmp_path / "cache")
    assert main(shlex.split(place.index_command)[1:]) == 0
    assert open_summary(place).samples == 1
