"""Where an index lies, and whether it still fits its shards."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.data.indexing import index_place
from pipeline.data.location import check_unchanged, open_index, open_summary
from pipeline.data.place import ShardPlace
from pipeline.data.write import write_shards
from pipeline.errors import UserError
from tests.support.pictures import png, source_sample, tar
from tests.support.shards import the_index


def test_several_directories_have_an_index_each_and_are_one_data_set(tmp_path: Path):
    write_shards(tmp_path / "a", map(source_sample, range(4)), 2)
    write_shards(tmp_path / "b", map(source_sample, range(4, 8)), 2)
    shards = (f"{tmp_path}/b/00001.tar", f"{tmp_path}/a", f"{tmp_path}/b/00000.tar")
    place = ShardPlace(shards=shards, cache_dir=tmp_path / "cache")
    index_place(place, 0)
    index = open_index(place)
    assert [index.key(row) for row in range(8)] == [
        "00006",
        "00007",
        "00000",
        "00001",
        "00002",
        "00003",
        "00004",
        "00005",
    ]
    assert [shard.name for shard in open_summary(place).shards] == [shard.name for shard in index.shards]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"00000.tar", "00001.tar", "index.json", "index.npz"}


@pytest.mark.parametrize("directories", [1, 2])
def test_the_index_can_live_where_the_user_says(tmp_path: Path, directories: int):
    names = [f"part{number}" for number in range(directories)]
    for number, name in enumerate(names):
        write_shards(tmp_path / name, map(source_sample, range(4 * number, 4 * number + 4)), 2)
    shards = tuple(str(tmp_path / name) for name in names)
    place = ShardPlace(shards=shards, cache_dir=tmp_path / "cache", index_dir=tmp_path / "elsewhere")
    assert main(["shards", "index", *shards, "--index", str(tmp_path / "elsewhere")]) == 0
    assert not any(path.suffix in (".json", ".npz") for name in names for path in (tmp_path / name).iterdir())
    assert len(open_index(place)) == 4 * directories
    assert main(["shards", "check", *shards, "--index", str(tmp_path / "elsewhere"), "--workers", "1"]) == 0


def test_shards_move_with_their_index(place: ShardPlace, tmp_path: Path):
    the_index(place)
    (tmp_path / "shards").rename(tmp_path / "moved")
    moved = place.model_copy(update={"shards": (str(tmp_path / "moved"),)})
    assert open_index(moved).shards[0].name == str(tmp_path / "moved" / "00000.tar")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def copy_over(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("change", [touch, copy_over])
def test_a_touched_or_copied_shard_is_the_same_shard(place: ShardPlace, tmp_path: Path, change: Callable[[Path], None]):
    the_index(place)
    change(tmp_path / "shards" / "00002.tar")
    assert len(open_summary(place).shards) == 4


def test_a_shard_of_the_same_size_with_other_captions_is_another_one(place: ShardPlace, tmp_path: Path):
    the_index(place)
    path = tmp_path / "shards" / "00002.tar"
    content = path.read_bytes()
    assert content.count(b"picture 12") == 1
    path.write_bytes(content.replace(b"picture 12", b"picture 21"))
    with pytest.raises(
        UserError, match=r"00002\.tar changed since the index was made; run `unclip shards index .*shards"
    ):
        open_summary(place)
    before = open_summary_after_indexing(place, tmp_path, content)
    path.write_bytes(content.replace(b"picture 12", b"picture 21"))
    the_index(place)
    after = open_summary(place)
    assert [b.contents["txt"] == a.contents["txt"] for b, a in zip(before, after.shards, strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


def open_summary_after_indexing(place: ShardPlace, tmp_path: Path, content: bytes) -> tuple:
    (tmp_path / "shards" / "00002.tar").write_bytes(content)
    the_index(place)
    return open_summary(place).shards


def test_more_touched_shards_than_can_be_read_at_once_are_left_to_the_user(
    place: ShardPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    the_index(place)
    touch(tmp_path / "shards" / "00002.tar")
    monkeypatch.setattr("pipeline.data.location.READ_AGAIN_BYTES", 1)
    with pytest.raises(
        UserError, match=r"1 shards of .*, such as 00002\.tar, were written or copied .*unclip shards index"
    ):
        open_summary(place)


def test_what_is_not_known_of_a_time_is_not_compared(place: ShardPlace, tmp_path: Path):
    from pipeline.data.indexing import without_times
    from pipeline.data.summary import IndexSummary

    index = without_times(the_index(place))
    touch(tmp_path / "shards" / "00000.tar")
    check_unchanged(IndexSummary(index.shards, ""), tmp_path / "shards", "remedy")


@pytest.mark.parametrize("link", [False, True])
def test_a_shard_that_vanished_from_its_directory_is_missed(place: ShardPlace, tmp_path: Path, link: bool):
    the_index(place)
    gone = tmp_path / "shards" / "00002.tar"
    gone.unlink()
    if link:
        gone.symlink_to(tmp_path / "unmounted" / "00002.tar")
    with pytest.raises(UserError, match=r"00002\.tar is in the index and not on disk; put it back, or run `unclip"):
        open_summary(place)
    some = place.model_copy(update={"shards": (f"{tmp_path}/shards/{{00000..00001}}.tar",)})
    assert open_summary(some).samples == 10
    the_index(place)
    assert open_summary(place).samples == 15


def test_an_index_in_a_place_of_its_own_is_not_taken_for_that_of_other_shards_with_the_same_names(tmp_path: Path):
    for name, text in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "0.tar", {"0.png": png((1, 1, 1)), "0.txt": text})
        os.utime(tmp_path / name / "0.tar", ns=(7, 7))
    places = [
        ShardPlace(shards=(str(tmp_path / name),), cache_dir=tmp_path / "c", index_dir=tmp_path / "i") for name in "ab"
    ]
    index_place(places[0], 0)
    with pytest.raises(UserError, match=r"0\.tar changed since"):
        open_summary(places[1])
    index_place(places[1], 0)
    assert open_summary(places[1]).samples == 1
    (tmp_path / "b").rename(tmp_path / "moved")
    moved = places[1].model_copy(update={"shards": (str(tmp_path / "moved"),)})
    assert open_summary(moved).samples == 1


def test_a_pattern_that_begins_with_a_brace_stands_for_the_same_from_anywhere(tmp_path: Path):
    for name in "ab":
        write_shards(tmp_path / name, map(source_sample, range(2)), 1)
    place = ShardPlace(shards=(f"{{{tmp_path}/a,{tmp_path}/b}}/{{00000..00001}}.tar",), cache_dir=tmp_path / "c")
    assert place.from_anywhere().expand() == place.expand() != []
