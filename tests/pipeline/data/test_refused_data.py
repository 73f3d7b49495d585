"""Data that cannot be used is refused by the commands in one line."""

import io
import shlex
import tarfile
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.support.command import refusal


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_a_data_path_that_does_not_exist_is_refused(capsys):
    message = refusal(capsys, "plan", "data=webdataset", "data.shards=/no/such/directory")
    assert "data.shards: /no/such/directory does not exist" in message
    assert "give a directory of tars" in message


def test_a_brace_pattern_in_the_shell_s_quotes_reaches_the_shards(capsys, tmp_path: Path):
    quoted = f"data.shards={tmp_path}/{{00000..00003}}.tar"
    assert f"{tmp_path}/00000.tar does not exist (4 of 4 missing)" in refusal(capsys, "plan", "data=webdataset", quoted)
    spelled = [f"data.shards={tmp_path}/0000{number}.tar" for number in range(4)]
    message = refusal(capsys, "plan", "data=webdataset", *spelled)
    assert message.strip() == (
        "unclip: data.shards is given 4 times, as the shell spelled out the braces; quote it: " + shlex.quote(quoted)
    )


def test_a_directory_without_tars_is_refused(capsys, tmp_path: Path):
    message = refusal(capsys, "plan", "data=webdataset", f"data.shards={tmp_path}")
    assert f"data.shards: {tmp_path} holds no *.tar; give" in message


def test_data_that_runs_a_shell_is_refused_unless_allowed(capsys):
    message = refusal(capsys, "plan", "data=webdataset", "data.shards='pipe:cat x.tar'")
    assert "would run a shell command; set data.allow_shell_urls=true" in message


def test_shards_without_an_index_block_the_plan_and_refuse_the_run(capsys, tmp_path: Path):
    tar(tmp_path / "00000.tar", ["a.jpg", "a.txt"])
    arguments = ["data=webdataset", f"data.shards={tmp_path}"]
    assert main(["plan", *arguments]) == 0
    table = capsys.readouterr().out
    assert table.count("blocked") == 9
    assert "unclip shards index" in table
    message = refusal(capsys, "run", *arguments)
    assert f"stage prepare is blocked: {tmp_path} has no index" in message
    assert f"run `unclip shards index {tmp_path}`" in message


def test_a_shard_that_is_no_tar_is_refused(capsys, tmp_path: Path):
    (tmp_path / "00000.tar").write_bytes(b"this is no tar" * 100)
    message = refusal(capsys, "shards", "index", str(tmp_path))
    assert str(tmp_path / "00000.tar") in message
    assert "tar" in message.replace("00000.tar", "")


def test_captions_without_images_are_refused(capsys, tmp_path: Path):
    tar(tmp_path / "00000.tar", ["a.txt", "b.txt"])
    message = refusal(capsys, "shards", "index", str(tmp_path))
    assert "no complete sample" in message
    assert "a sample needs key.txt beside key.jpg" in message
