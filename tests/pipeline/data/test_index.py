import gzip
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.index import IMAGE_EXTENSIONS, ShardIndex, read_index, write_index
from pipeline.data.indexing import index_shards
from pipeline.data.reader import SampleReader
from pipeline.data.summary import check_shard_sizes, index_command, index_identity, read_summary
from pipeline.data.walk import walk_shard
from pipeline.data.write import write_shards
from pipeline.errors import UserError
from tests.support.pictures import png, source_sample, tar
from tests.support.shards import update_index

RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards; the second as img2dataset would write it, with flaws."""
    first = tar(
        tmp_path / "a.tar", {"one.png": RED, "one.txt": b"one", "two.jpg": BLUE, "two.txt": b"two", "two.json": b"{}"}
    )
    flawed = {
        "000.png": RED,
        "001.png": BLUE,
        "001.txt": "zwölf".encode(),
        "002.txt": b"no picture",
        "d/003.seg.png": RED,
        "d/003.PNG": BLUE,
        "d/003.txt": b"three",
        "001.webp": RED,
        "001.TXT": b"again",
        "__meta__": b"x",
    }
    return [str(first), str(tar(tmp_path / "b.tar", flawed))]


def arrays(index: ShardIndex) -> dict[str, NDArray[Any]]:
    members = {"image": index.image, **index.texts}
    return {
        **{name: getattr(index, name) for name in ("shard", "image_extension", "key_bytes", "key_offset")},
        **{
            f"{name}.{field.name}": getattr(each, field.name)
            for name, each in members.items()
            for field in fields(each)
        },
    }


def rows(index: ShardIndex) -> list[str]:
    return [index.key(row) for row in range(len(index))]


def test_the_index_reads_what_was_put_into_the_tars(shards: list[str], tmp_path: Path):
    directory, index = update_index(shards, tmp_path / "cache")
    reader = SampleReader(index, directory, tmp_path / "cache")
    assert [(index.key(row), reader.image(row), reader.caption(row), reader.attributes(row)) for row in range(4)] == [
        ("one", RED, "one", None),
        ("two", BLUE, "two", {}),
        ("001", BLUE, "zwölf", None),
        ("d/003", BLUE, "three", None),
    ]
    assert [IMAGE_EXTENSIONS[code] for code in index.image_extension] == ["png", "jpg", "png", "png"]


def test_incomplete_samples_are_left_out_and_counted_by_reason(shards: list[str], tmp_path: Path):
    update_index(shards, tmp_path / "cache")
    first, second = read_summary(tmp_path).shards
    assert (first.samples, first.left_out) == (2, {})
    assert (second.samples, second.left_out) == (2, {"duplicate_key": 1, "missing_caption": 1, "missing_image": 1})
    assert second.skipped == {"metadata": 1}


def test_an_index_survives_being_written_and_read(shards: list[str], tmp_path: Path):
    directory, index = update_index(shards, tmp_path / "cache")
    again = read_index(directory)
    assert again.shards == index.shards
    assert arrays(again).keys() == arrays(index).keys() > {"txt.offset", "json.digest"}
    for name, array in arrays(again).items():
        np.testing.assert_array_equal(array, arrays(index)[name])


def test_the_arrays_of_an_index_are_mapped_and_not_read_into_memory(shards: list[str], tmp_path: Path):
    directory, written = update_index(shards, tmp_path / "cache")
    index = read_index(directory)
    for name, mapped in arrays(index).items():
        assert isinstance(mapped, np.memmap)
        assert not mapped.flags.writeable
        np.testing.assert_array_equal(mapped, arrays(written)[name])


def test_only_changed_shards_are_walked_again(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update_index(shards, tmp_path / "cache")
    walked = []
    monkeypatch.setattr(
        "pipeline.data.indexing.walk_shard", lambda path, name: (walked.append(name), walk_shard(path, name))[1]
    )
    update_index(shards, tmp_path / "cache")
    assert walked == []
    tar(tmp_path / "a.tar", {"new.png": RED, "new.txt": b"new"})
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    _, index = update_index(shards, tmp_path / "cache")
    assert walked == ["a.tar"]
    assert rows(index) == ["new", "001", "d/003"]


def test_indexing_some_shards_keeps_the_others_in_the_index(shards: list[str], tmp_path: Path):
    update_index(shards[:1], tmp_path / "cache")
    _, second = update_index(shards[1:], tmp_path / "cache")
    assert rows(second) == ["001", "d/003"]
    assert rows(read_index(tmp_path)) == ["001", "d/003", "one", "two"]
    assert rows(read_index(tmp_path).select(["a.tar", "b.tar"], "x")) == ["one", "two", "001", "d/003"]


def test_a_truncated_tar_keeps_the_samples_before_the_break(tmp_path: Path):
    path = tar(tmp_path / "a.tar", {"0.png": RED, "0.txt": b"zero", "1.png": RED, "1.txt": b"x" * 5000})
    path.write_bytes(path.read_bytes()[:5000])
    _, index = update_index([str(path)], tmp_path / "cache")
    assert rows(index) == ["0"]
    assert index.shards[0].left_out == {"missing_caption": 1, "truncated": 1}


NO_TARS = {"empty": b"", "text": b"this is no tar" * 100, "gzip": gzip.compress(b"x" * 3000, mtime=0)}


@pytest.mark.parametrize("content", NO_TARS.values(), ids=NO_TARS)
def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.shards: .*/a\.tar is no uncompressed tar"):
        update_index([str(tmp_path / "a.tar")], tmp_path / "cache")


def test_captions_without_images_are_refused_with_what_was_found(tmp_path: Path):
    path = tar(tmp_path / "a.tar", {"0.txt": b"zero", "1.txt": b"one"})
    with pytest.raises(UserError, match=r"no complete sample .*2 missing_image.*key\.txt"):
        update_index([str(path)], tmp_path / "cache")


def test_a_shard_that_changed_since_is_refused_with_the_command_that_mends_it(shards: list[str], tmp_path: Path):
    update_index(shards, tmp_path / "cache")
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(UserError, match=r"a\.tar has \d+ bytes and had \d+ .*unclip shards index"):
        check_shard_sizes(read_summary(tmp_path), tmp_path, index_command(tmp_path))


@pytest.mark.parametrize("name", ["index.json", "index.npz"])
def test_a_damaged_index_is_refused_and_made_anew_by_indexing(shards: list[str], tmp_path: Path, name: str):
    update_index(shards, tmp_path / "cache")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{name} cannot be read .*unclip shards index"):
        read_index(tmp_path)
    update_index(shards, tmp_path / "cache")
    assert len(read_index(tmp_path)) == 4


def test_arrays_of_another_index_are_not_taken_for_this_ones(shards: list[str], tmp_path: Path):
    _, index = update_index(shards, tmp_path / "cache")
    write_index(tmp_path / "other", replace(index, image_extension=index.image_extension + 1))
    (tmp_path / "index.npz").write_bytes((tmp_path / "other" / "index.npz").read_bytes())
    with pytest.raises(UserError, match="not the one"):
        read_index(tmp_path)


def test_the_identity_follows_the_content_and_neither_place_nor_time(tmp_path: Path):
    identities = []
    for place, number in (("x", 3), ("y", 3), ("z", 4)):
        paths = write_shards(tmp_path / place, map(source_sample, range(number)), 2)
        update_index([str(path) for path in paths], tmp_path / "cache")
        identities.append(json.dumps(index_identity(read_summary(tmp_path / place), {"image", "txt"})))
    assert identities[0] == identities[1] != identities[2]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path):
    for place in ("x", "y"):
        write_shards(tmp_path / place, map(source_sample, range(7)), 3)
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar"]
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in names)


def test_a_remote_shard_is_indexed_through_the_cache(shards: list[str], tmp_path: Path):
    url = f"pipe:cat {shards[0]}"
    directory, index = update_index([url], tmp_path / "cache")
    assert directory.parent == tmp_path / "cache"
    reader = SampleReader(read_index(directory), directory, tmp_path / "cache")
    assert (rows(index), reader.caption(1)) == (["one", "two"], "two")


def test_webdataset_groups_the_same_samples(shards: list[str], tmp_path: Path):
    import webdataset

    index = index_shards(["a.tar"], tmp_path)
    expected = [
        (sample["__key__"], sample["txt"].decode())
        for sample in webdataset.WebDataset(shards[0], shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    ]
    reader = SampleReader(index, tmp_path, tmp_path / "cache")
    assert [(index.key(row), reader.caption(row)) for row in range(len(index))] == expected


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("summary", "numpy"),
        ("summary", "torch"),
        ("index", "torch"),
        ("walk", "torch"),
        ("indexing", "torch"),
        ("location", "numpy"),
        ("order", "torch"),
        ("prepared", "torch"),
    ],
)
def test_what_planning_imports_stays_light(module: str, banned: str):
    code = f"import sys, pipeline.data.{module}; sys.exit({banned!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
