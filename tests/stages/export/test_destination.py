"""A directory that is whole, or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from stages.export.destination import RECORD, written_whole


def export(target: Path, content: str = "new", *, overwrite: bool = False) -> None:
    with written_whole(target, overwrite=overwrite) as directory:
        (directory / "weights").write_text(content)
        (directory / "weights").chmod(0o600)  # as safetensors writes them
        (directory / RECORD).write_text("{}")


def test_what_is_written_takes_the_place_of_nothing_or_of_an_empty_directory(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "new"):
        export(target)
        assert sorted(each.name for each in target.iterdir()) == [RECORD, "weights"]
        assert [each.name for each in target.parent.iterdir() if each.name.startswith(".")] == []
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "empty").stat().st_mode == plain.stat().st_mode
    assert (tmp_path / "empty" / "weights").stat().st_mode == (tmp_path / "empty" / RECORD).stat().st_mode


def test_an_earlier_export_gives_way_only_where_it_is_asked_to(tmp_path: Path):
    target = tmp_path / "it"
    export(target, "old")
    with pytest.raises(UserError, match="--overwrite"):
        export(target)
    assert (target / "weights").read_text() == "old"
    export(target, overwrite=True)
    assert (target / "weights").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_else_ever_gives_way(tmp_path: Path, overwrite: bool):
    (tmp_path / "mine").write_text("precious")
    for target, said in (
        (tmp_path, "no earlier export"),
        (tmp_path / "mine", "file"),
        (tmp_path / "mine" / "x", "file"),
    ):
        with pytest.raises(UserError, match=said):
            export(target, overwrite=overwrite)
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"):
        export(Path("/proc/none/it"))


def test_a_failure_leaves_what_was_there(tmp_path: Path):
    target = tmp_path / "it"
    export(target, "old")

    def fail() -> None:
        with written_whole(target, overwrite=True) as directory:
            (directory / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["it"]
    assert (target / "weights").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from stages.export.destination import written_whole

with written_whole(Path(sys.argv[1]), overwrite=False) as directory:
    (directory / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_no_directory_of_that_name(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "it")], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "it").exists()
    export(tmp_path / "it")
