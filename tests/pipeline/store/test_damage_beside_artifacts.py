"""What every command says of damaged records, checkpoints and code, and of files in the place of folders."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import OnDamage
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.runs import RECORD, run_directory
from pipeline.workflow.sealed import write_json_atomically
from tests.support.command import said, shown
from tests.support.stores import flip, planned_where, record, there


def test_a_run_whose_record_is_damaged_stops_nothing_but_gc_and_can_be_removed(
    outputs: Path, capsys: pytest.CaptureFixture[str]
):
    at, path = ["--outputs", str(outputs)], run_directory(outputs, "second") / RECORD
    path.write_bytes(b"\xff")
    remedy = f"run second again, or remove it: unclip rm second --delete --outputs {outputs}"
    for status, *command in ((0, "status"), (0, "du"), (2, "gc"), (2, "verify", "--all"), (2, "status", "second")):
        ended, text = shown(capsys, *command, *at)
        assert (ended, remedy in text) == (status, True), command
        assert str(path) in text
    ended, text = shown(capsys, "verify", *at)
    assert (ended, "the latest run, first (--all: all that there is)" in text) == (0, True)  # that can be read
    assert "second: " in said("rm", "second", *at)
    before = there(outputs)
    said("rm", "second", "--delete", *at)
    assert not path.parent.exists()
    assert there(outputs) == before  # what it needed is gc's
    assert shown(capsys, "gc", *at)[0] == 0


def test_of_two_runs_whose_records_are_damaged_each_is_removed_by_the_line_that_says_so(
    outputs: Path, capsys: pytest.CaptureFixture[str]
):
    at, before = ["--outputs", str(outputs)], there(outputs)
    for name in ("first", "second"):
        (run_directory(outputs, name) / RECORD).write_bytes(b"\xff")
    for name in ("first", "second"):
        assert f"unclip rm {name} --delete" in shown(capsys, "gc", *at)[1].replace("second", name)
        said("rm", name, "--delete", *at)
        assert not run_directory(outputs, name).exists()
        assert there(outputs) == before  # what they needed is gc's


def test_verify_says_of_a_damaged_checkpoint_whether_there_is_one_before_it(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    place = outputs / "work" / "clip" / clip.manifest.fingerprint / "checkpoints"
    for samples in (8, 16):
        (place / f"samples-{samples:012}.ckpt").mkdir(parents=True)
        part = place / f"samples-{samples:012}.ckpt" / "part"
        part.write_bytes(b"1234")
        values = {"samples_seen": samples, "files": {"part": file_sha256(part)}, "elapsed_s": 1.0}
        write_json_atomically(part.parent.with_suffix(".json"), values)
    for samples, instead in ((16, "the one before it is used"), (8, "none before it is whole, and the stage begins")):
        damaged = place / f"samples-{samples:012}.ckpt"
        flip(damaged / "part")
        for is_finished in (True, False):
            held = clip.path if is_finished else clip.path.rename(outputs / "held")
            status, text = shown(capsys, "verify", "first", "--outputs", str(outputs))
            held.rename(clip.path)
            said = "its stage is finished, and needs none" if is_finished else instead
            assert (status, f"{damaged} is damaged and passed over; {said}" in text) == (2, True)


def test_a_damaged_record_of_a_stage_is_named_with_what_can_be_done(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    work = outputs / "work" / "clip" / clip.manifest.fingerprint
    (work / "hardware.json").write_bytes(b"\xff")
    (frozen,) = (work / "frozen").glob("*.json")
    frozen.write_bytes(b"\xff")
    status, text = shown(capsys, "verify", "first", "--outputs", str(outputs))
    assert (status, text.count("it is left out, and can be removed")) == (2, 2)
    frozen.unlink()
    frozen.symlink_to(frozen)
    shutil.rmtree(clip.path)  # from now on it is needed
    text = shown(capsys, "verify", "first", "--outputs", str(outputs))[1]
    assert f"{frozen} cannot be read (it is a link to itself); run it again, which writes it anew" in text


def test_what_is_there_in_place_of_a_run_is_named_and_can_be_removed(
    outputs: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
):
    at = ("--outputs", str(outputs))
    held = tmp_path_factory.mktemp("held") / "first"
    (outputs / "runs" / "first").rename(held)
    (outputs / "runs" / "first").symlink_to(tmp_path_factory.getbasetemp() / "not mounted")
    for command in (("verify", "--all"), ("status", "first"), ("du",)):
        text = shown(capsys, *command, *at)[1]
        assert f"{outputs / 'runs' / 'first'} is no folder of a run" in text, command
    assert "removed first" in said("rm", "first", "--delete", *at)
    held.rename(outputs / "runs" / "first")
    assert shown(capsys, "verify", "--all", *at)[0] == 0


@pytest.mark.parametrize("is_pinned", [False, True])
def test_verify_names_a_damaged_record_of_an_earlier_config_with_what_a_pin_asks_for(
    outputs: Path, capsys: pytest.CaptureFixture[str], is_pinned: bool
):
    at = ("--outputs", str(outputs))
    record(outputs, "second", weight=0.7)
    (earlier,) = (outputs / "runs" / "second" / "earlier").glob("*.json")
    earlier.write_text("{}")
    if is_pinned:
        (outputs / "runs" / "second" / "pinned").touch()
    status, text = shown(capsys, "verify", "--all", *at)
    remedy = "put an intact copy there, or unpin it: unclip gc" if is_pinned else "it is left out, and can be removed"
    assert (status, f"{earlier} cannot be read" in text, remedy in text) == (2, True, True)


def test_verify_reads_the_snapshots_of_code(outputs: Path, capsys: pytest.CaptureFixture[str]):
    place = planned_where(outputs, OnDamage.STOP).code.keep(outputs)
    at = ("--outputs", str(outputs))
    assert shown(capsys, "verify", "--all", *at)[0] == 0
    file = place / "pipeline" / "config.py"
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    assert (
        f"{file} is not as it was submitted; remove {place} and run again" in shown(capsys, "verify", "--all", *at)[1]
    )
    file.write_bytes(content)
    (place / "code.json").write_bytes(b"{")
    assert (
        f"{place / 'code.json'} is gone or damaged; remove {place} and run again"
        in shown(capsys, "verify", "--all", *at)[1]
    )
    planned_where(outputs, OnDamage.STOP).code.keep(outputs)
    assert shown(capsys, "verify", "--all", *at)[0] == 0


def test_a_store_that_lost_its_runs_is_said_to_have_by_every_command(outputs: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(outputs / "runs")
    at = ("--outputs", str(outputs))
    remedy = f"bring it back, or if no run is left: mkdir {outputs / 'runs'}"
    for command in (
        ("status", "first"), ("verify", "first"), ("verify", "--all"), ("compare", "first"), ("card", "first"),
        ("rm", "first"), ("mv", "first", "other"), ("gc",), ("du",),
    ):  # fmt: skip
        status, text = shown(capsys, *command, *at)
        assert (status, remedy in text) == (2, True), command
    start([planned_where(outputs, OnDamage.STOP)], Display(Console(file=io.StringIO())), waits=True)
    said = f"{outputs / 'runs'} is made anew: what is here is needed by no run now, see unclip gc --outputs {outputs}"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("in_the_way", "command"),
    [
        ("runs/first/pictures", ("status", "first")),
        ("work/clip/{}/log.txt/", ("logs", "first", "clip")),
        ("runs/first/README.md/", ("card", "first")),
    ],
)
def test_a_file_or_a_directory_that_is_in_the_way_is_a_line(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str], in_the_way: str, command: tuple[str, ...]
):
    path = outputs / in_the_way.format(clip.manifest.fingerprint).rstrip("/")
    path.unlink(missing_ok=True)
    path.mkdir(parents=True) if in_the_way.endswith("/") else path.write_bytes(b"")
    status, text = shown(capsys, *command, "--outputs", str(outputs))
    assert status == 2
    assert str(path) in text


@pytest.mark.parametrize("tree", ["artifacts", "work"])
def test_a_file_in_the_place_of_all_artifacts_or_work_folders_is_said_by_every_command(
    outputs: Path, capsys: pytest.CaptureFixture[str], tree: str
):
    (outputs / tree).rename(outputs / "held")
    (outputs / tree).write_bytes(b"")
    for command in (
        ("status", "first"), ("verify", "first"), ("verify", "--all"), ("compare", "first"), ("card", "first"),
        ("sync",), ("rm", "first"), ("mv", "first", "other"), ("gc",), ("du",), ("logs", "first", "clip"),
        ("push", "first", str(outputs / "remote")), ("sample", "first", "a circle"),
    ):  # fmt: skip
        status, text = shown(capsys, *command, "--outputs", str(outputs))
        assert (status, f"{outputs / tree} is no directory; bring that back" in text) == (2, True), (command, text)
