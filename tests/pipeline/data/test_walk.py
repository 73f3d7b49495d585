from pathlib import Path

import pytest

from pipeline.data.check import CHANGED, UNREADABLE
from pipeline.data.decode import DecodeFault
from pipeline.data.index import IMAGE_EXTENSIONS, ShardIndex
from pipeline.data.reader import SampleReader
from pipeline.data.reasons import EXPLANATIONS
from pipeline.data.tar import Damage, NotAFile
from pipeline.data.walk import MAX_TEXTS, LeftOut, Skipped, walk_shard
from tests.support.pictures import png, tar

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def walked(tmp_path: Path, files: dict[str, bytes]) -> ShardIndex:
    return walk_shard(tar(tmp_path / "a.tar", files), "a.tar")


def keys(index: ShardIndex) -> list[str]:
    return [index.key(row) for row in range(len(index))]


@pytest.mark.parametrize("directory", ["", "train/"])
def test_what_macos_adds_is_skipped_wherever_it_stands(tmp_path: Path, directory: str):
    files: dict[str, bytes] = {}
    for number in range(3):
        for extension, content in (("png", RED), ("txt", b"red")):
            files[f"{directory}._{number}.{extension}"] = b"\0\5\x16\7Mac OS X"
            files[f"{directory}{number}.{extension}"] = content
        files[f"{directory}.DS_Store"] = b"x"
    index = walked(tmp_path, files)
    assert keys(index) == [f"{directory}{number}" for number in range(3)]
    assert index.shards[0].skipped == {Skipped.APPLE_DOUBLE: 6, Skipped.NO_KEY: 1}
    assert index.shards[0].left_out == {}


def test_keys_end_at_their_first_dot_and_what_that_leaves_without_a_picture_is_said(tmp_path: Path):
    files = {"v1.0/0.jpg": RED, "v1.0/0.seg.png": BLUE, "v1.0/0.txt": b"red"}
    files |= {name: content for n in range(3) for name, content in ((f"photo.{n}.jpg", RED), (f"photo.{n}.txt", b"x"))}
    index = walked(tmp_path, files)
    assert keys(index) == ["v1.0/0"]
    assert index.shards[0].left_out == {LeftOut.DOTTED_KEY: 3}
    assert set(index.texts) == {"txt"}


def test_every_text_of_a_sample_is_in_the_index(tmp_path: Path):
    files = {
        "0.png": RED,
        "0.txt": b"alt",
        "0.blip.txt": b"a red square",
        "0.json": b"{}",
        "1.png": BLUE,
        "1.cls": b"3",
    }
    index = walked(tmp_path, files)
    assert {name: members.is_present.tolist() for name, members in index.texts.items()} == {
        "blip.txt": [True, False],
        "cls": [False, True],
        "json": [True, False],
        "txt": [True, False],
    }
    reader = SampleReader(index, tmp_path, tmp_path / "cache")
    assert reader.text(0, "blip.txt") == b"a red square"
    assert reader.text(1, "blip.txt") is None
    assert reader.text(1, "cls") == b"3"


def test_of_too_many_kinds_of_text_the_most_frequent_are_kept_and_the_rest_is_said(tmp_path: Path):
    files = {"0.png": RED, "0.txt": b"a", **{f"0.t{n}": b"x" for n in range(80)}, "1.png": RED, "1.txt": b"b"}
    index = walked(tmp_path, files)
    assert len(index.texts) == MAX_TEXTS
    assert "txt" in index.texts
    assert index.shards[0].skipped == {Skipped.FURTHER_TEXT: 81 - MAX_TEXTS}


def test_a_picture_without_any_text_is_left_out(tmp_path: Path):
    index = walked(tmp_path, {"0.png": RED, "1.png": BLUE, "1.txt": b"blue"})
    assert keys(index) == ["1"]
    assert index.shards[0].left_out == {LeftOut.MISSING_CAPTION: 1}


def test_extensions_that_nobody_could_type_are_skipped(tmp_path: Path):
    index = walked(tmp_path, {"0.png": RED, "0.": b"x", "0.txt\njson": b"x", "0.t\udcffxt": b"x", "0.txt": b"red"})
    assert set(index.texts) == {"txt"}
    assert index.shards[0].skipped == {Skipped.NO_KEY: 3}


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "gif", "bmp", "JPG"])
def test_pictures_are_known_by_their_extension(tmp_path: Path, extension: str):
    index = walked(tmp_path, {f"0.{extension}": RED, "0.txt": b"red"})
    assert IMAGE_EXTENSIONS[index.image_extension[0]] == extension.lower()


def test_a_compressed_tar_is_refused_by_its_kind(tmp_path: Path):
    from pipeline.errors import UserError

    (tmp_path / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 3000)
    with pytest.raises(UserError, match=r"a\.tar is no uncompressed tar \(it is compressed by zstd\)"):
        walk_shard(tmp_path / "a.tar", "a.tar")


def test_every_reason_is_explained():
    reasons = {*Damage, *NotAFile, *LeftOut, *Skipped, *DecodeFault, CHANGED, UNREADABLE}
    assert {str(reason) for reason in reasons} == set(EXPLANATIONS)
