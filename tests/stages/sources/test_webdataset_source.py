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
from pipeline.data.splits import Split, split_of
from pipeline.data.walk import update_index
from pipeline.errors import UserError
from stages.settings import WebDatasetSettings
from stages.sources.webdataset import summary, take_in


def settings(shards: Path | str, **changes: Any) -> WebDatasetSettings:
    defaults = {
        "source": "webdataset",
        "split_key": "key",
        "validation_fraction": 0.4,
        "shards": str(shards),
        "allow_shell_urls": False,
        "cache_dir": "unused",
        "cache_gib": None,
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
        take_in(settings(shards), tmp_path)


def test_samples_are_split_by_their_key(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    found, splits, root = take_in(settings(shards), tmp_path)
    assert root == shards
    assert splits.tolist() == [split_of(found.key(row), 0.4).code for row in range(30)]
    assert 0 < (splits == Split.VALIDATION.code).sum() < 30


def test_a_field_of_the_json_can_decide_the_split(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    _, splits, _ = take_in(settings(shards, split_key="photographer", validation_fraction=0.2), tmp_path)
    expected = [split_of(str(row // 5), 0.2).code for row in range(30)]
    assert splits.tolist() == expected
    assert len(set(expected)) == 2


def test_a_split_key_that_no_json_has_is_refused(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    with pytest.raises(UserError, match=r"data\.split_key author is no field .*: key, photographer, status"):
        take_in(settings(shards, split_key="author"), tmp_path)


def test_a_pattern_takes_its_part_of_the_index(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    part = settings(f"{shards}/{{00002,00000}}.tar")
    found, splits, _ = take_in(part, tmp_path)
    assert [shard.name for shard in found.shards] == ["00002.tar", "00000.tar"]
    assert (len(found), len(splits)) == (20, 20)
    assert summary(part, tmp_path).shards == found.shards


def test_a_shard_that_is_not_indexed_is_refused(shards: Path, tmp_path: Path):
    index(f"{shards}/{{00000..00001}}.tar", tmp_path)
    with pytest.raises(UserError, match=r"00002\.tar is not in the index .*unclip shards index"):
        take_in(settings(shards), tmp_path)


def test_a_shard_that_changed_is_seen_by_the_summary(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    (shards / "00001.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"00001\.tar has 0 bytes"):
        summary(settings(shards), tmp_path)


def test_taken_in_shards_stay_where_they_are(shards: Path, tmp_path: Path):
    index(shards, tmp_path)
    found, splits, root = take_in(settings(shards), tmp_path)
    write_prepared(tmp_path / "artifact", index=found, splits=splits, shards_root=root, cache_dir=tmp_path / "cache")
    data = read_prepared(tmp_path / "artifact")
    assert data.caption(12) == "caption 000010002"
    assert data.attributes(12)["photographer"] == 2
    np.testing.assert_array_equal(data.samples_in(Split.TRAIN), np.flatnonzero(splits == Split.TRAIN.code))
