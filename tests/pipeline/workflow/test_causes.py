"""The record of starts and ends, and what it allows."""

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.workflow.causes import ENDS, Cause, End, last_words, read_ends, starts_again, write_end
from pipeline.workflow.frozen import halve_micro_batch, read_frozen, write_frozen
from pipeline.workflow.sealed import warn
from tests.support import ROOT, tiny


def test_a_start_that_was_followed_by_another_without_a_word_lost_its_node(tmp_path: Path):
    for start, node in ((0, "a"), (1, "b")):
        write_end(tmp_path, End("7", start, node))
    lost, running = read_ends(tmp_path)
    assert (lost.nodes, lost.cause, running.cause) == ("a", Cause.NODE_FAILURE, None)
    assert last_words(tmp_path, "7") == "node failure on a"
    write_end(tmp_path, End("7", 1, "b", Cause.OUT_OF_MEMORY, "too much", "starts again (1 of 3)"))
    assert last_words(tmp_path, "7") == "out of memory: starts again (1 of 3)"
    assert last_words(tmp_path, "8") == ""  # of another submission


def test_whatever_bytes_are_in_the_record_the_whole_lines_of_it_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    draws = random.Random(0)
    write_end(tmp_path, End("7", 0, "a", Cause.DATA, "m"))
    whole = (tmp_path / ENDS).read_bytes()
    for _ in range(300):
        noise = draws.randbytes(draws.randrange(40)).replace(b"\n", b"") + b"\n"
        (tmp_path / ENDS).write_bytes(noise + whole + noise)
        warn.cache_clear()
        assert read_ends(tmp_path) == [End("7", 0, "a", Cause.DATA, "m")]
        assert "damaged and left out" in capsys.readouterr().err


def test_no_bit_of_a_line_changes_unnoticed_whether_python_or_the_batch_script_wrote_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    script = (ROOT / "slurm" / "stage.sbatch").read_text()
    (note,) = re.findall(r"^note\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)
    job = {"SLURM_JOB_ID": "7", "restarts": "0", "nodes": "a,b", "work": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", f"{note}note '\"stopped\"'"], env=job, check=True)
    write_end(tmp_path, End("8", 0, "a", Cause.DATA, "m"))
    ends, whole = read_ends(tmp_path), (tmp_path / ENDS).read_bytes()
    assert ends == [End("7", 0, "a,b", Cause.STOPPED), End("8", 0, "a", Cause.DATA, "m")]
    for at in range(len(whole)):
        (tmp_path / ENDS).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        warn.cache_clear()
        assert read_ends(tmp_path) == ends or "damaged and left out" in capsys.readouterr().err


def test_a_cause_is_followed_by_as_many_starts_as_it_is_given():
    times = {Cause.DATA: 2}
    assert starts_again(times, Cause.DATA, [Cause.COLLECTIVE]) == "1 of 2"
    assert starts_again(times, Cause.DATA, [Cause.DATA]) == "2 of 2"
    assert starts_again(times, Cause.DATA, [Cause.DATA, Cause.DATA]) is None
    assert starts_again(times, Cause.SETTINGS, []) is None


def test_a_micro_batch_is_halved_until_it_is_one_and_the_frozen_file_stays(tmp_path: Path):
    path = write_frozen(tiny.frozen(tmp_path)).path
    before = path.read_bytes()
    assert [halve_micro_batch(path) for _ in range(4)] == [4, 2, 1, None]
    assert read_frozen(path).trainer.micro_batch_size == 1
    assert path.read_bytes() == before
