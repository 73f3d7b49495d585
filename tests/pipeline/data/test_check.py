import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data.decode import MAX_PIXELS
from tests.support.pictures import png, tar


def jpeg(**options: object) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(content, "JPEG", **options)
    return content.getvalue()


def bomb() -> bytes:
    content = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 1024 + 1, 1024)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A good shard and one with many kinds of fault, indexed."""
    directory = tmp_path / "shards"
    directory.mkdir()
    tar(directory / "good.tar", {"a.png": png((1, 2, 3)), "a.txt": b"one", "b.jpg": jpeg(), "b.txt": b"two"})
    tar(
        directory / "faulty.tar",
        {
            "a.jpg": jpeg()[:2000], "a.txt": b"a broken picture",
            "b.png": b"", "b.txt": b"none",
            "c.png": bomb(), "c.txt": b"a bomb",
            "d.png": png((1, 1, 1)), "d.txt": b" ",
            "e.png": png((1, 1, 1)),
            "f.png": png((1, 1, 1)), "f.txt": b"good",
        },
    )  # fmt: skip
    assert main(["shards", "index", str(directory)]) == 0
    return directory


def test_check_reads_every_sample_and_counts_what_cannot_be_used_by_reason(
    shards: Path, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    assert main(["shards", "check", str(shards), "--workers", "1"]) == 1
    line, *explanations, total = capsys.readouterr().out.splitlines()
    name, _, faults = line.partition(": ")
    assert name == "faulty.tar"
    expected = {"broken_image", "empty_image", "too_many_pixels", "empty_caption", "missing_caption"}
    assert set(faults.split(", ")) == {f"1 {reason}" for reason in expected}
    assert {explanation.partition(": ")[0] for explanation in explanations} == expected
    assert total.startswith("7 samples in 2 shards: 1 ")


def test_check_is_content_with_good_shards(shards: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["shards", "check", str(shards / "good.tar")]) == 0
    assert capsys.readouterr().out == "2 samples in 1 shards: all can be used\n"


def test_check_finds_shards_that_were_changed_or_destroyed_since_they_were_indexed(
    shards: Path, capsys: pytest.CaptureFixture[str]
):
    tar(shards / "good.tar", {"x.png": png((1, 2, 3)), "x.txt": b"another one"})
    (shards / "faulty.tar").write_bytes(b"no tar" * 1000)
    assert main(["shards", "check", str(shards)]) == 1
    out = capsys.readouterr().out
    assert "good.tar: 1 changed_since_indexed" in out
    assert "faulty.tar: 1 unreadable_shard" in out


def test_check_without_an_index_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tar(tmp_path / "a.tar", {"a.png": png((1, 2, 3)), "a.txt": b"one"})
    assert main(["shards", "check", str(tmp_path)]) == 2
    assert f"run `unclip shards index {tmp_path}`" in capsys.readouterr().err
