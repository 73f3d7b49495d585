import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.prepared import read_prepared, write_prepared
from pipeline.data.shards import expand_shards
from pipeline.data.splits import Split
from pipeline.errors import UserError
from stages.prepare.sources.webdataset import WebDatasetSettings, place_of, summary, take_in
from tests.support.shards import split_of, update_index


def settings(shards: Path | str, **changes: Any) -> WebDatasetSettings:
    defaults = {
        "source": "webdataset",
        "split_key": "key",
        "validation_fraction": 0.4,
        "shards": str(shards),
        "allow_shell_urls": False,
        "cache_dir": "outputs/cache",
        "cache_gib": None,
        "weights": None,
        "caption": "txt",
        "captions": None,
        "index_dir": None,
    }
    return WebDatasetSettings(**{**defaults, **changes})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten samples as img2dataset writes them; samples share a photographer by fives."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for shard in range(3):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as archive:
            for number in range(10):
                key = f"{shard:05d}{number:04d}"
                image = io.BytesIO()
                Image.new("RGB", (16, 12), (shard, number, 0)).save(image, "JPEG")
                fields = {"key": key, "photographer": (shard * 10 + number) // 5, "status": "success"}
                files = {"jpg": image.getvalue(), "txt": f"caption {key}".encode(), "json": json.dumps(fields).encode()}
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return directory


def index(value: Path | str, cache_dir: Path) -> None:
    update_index(expand_shards(str(value), allow_shell_urls=False), cache_dir)


def test_shards_must_be_indexed_first(shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match=rf"no index .*run `unclip shards index {shards}`"):
        take_in(settings(shards))


def test_samples_are_split_by_their_key(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    taken_in = take_in(settings(shards))
    found, splits = taken_in.index, taken_in.splits
    assert [shard.name for shard in found.shards] == [str(shards / f"0000{number}.tar") for number in range(3)]
    assert splits.tolist() == [split_of(found.key(row), 0.4).code for row in range(30)]
    assert 0 < (splits == Split.VALIDATION.code).sum() < 30


def test_a_field_of_the_json_can_decide_the_split(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    splits = take_in(settings(shards, split_key="photographer", validation_fraction=0.2)).splits
    expected = [split_of(str(row // 5), 0.2).code for row in range(30)]
    assert splits.tolist() == expected
    assert len(set(expected)) == 2


def test_a_split_key_that_no_json_has_is_refused(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    with pytest.raises(UserError, match=r"data\.split_key author is no field .*: key, photographer, status"):
        take_in(settings(shards, split_key="author"))


def test_a_pattern_takes_its_part_of_the_index(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    part = settings(f"{shards}/{{00002,00000}}.tar")
    found = take_in(part).index
    assert [Path(shard.name).name for shard in found.shards] == ["00002.tar", "00000.tar"]
    assert len(found) == 20
    assert summary(part).shards == found.shards


def test_a_shard_that_is_not_indexed_is_refused(shards: Path, tmp_path: Path):
    index(f"{shards}/{{00000..00001}}.tar", tmp_path)
    with pytest.raises(UserError, match=r"00002\.tar is not in the index .*unclip shards index"):
        take_in(settings(shards))


def test_a_shard_that_changed_is_seen_by_the_summary(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    (shards / "00001.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"00001\.tar changed since the index was made; run `unclip shards index"):
        summary(settings(shards))


def test_taken_in_shards_stay_where_they_are_and_the_artifact_does_not_say_where(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    taken_in = take_in(settings(shards))
    write_prepared(tmp_path / "artifact", index=taken_in.index, splits=taken_in.splits)
    for file in (tmp_path / "artifact").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    data = read_prepared(tmp_path / "artifact", place_of(settings(shards)))
    assert data.caption(12) == "caption 000010002"
    assert data.attributes(12)["photographer"] == 2
    np.testing.assert_array_equal(data.samples_in(Split.TRAIN), np.flatnonzero(taken_in.splits == Split.TRAIN.code))
