"""A run in a store elsewhere: a real S3 server, and a directory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.store.remote import PULLING, RemoteStore, pull, push
from pipeline.workflow.artifacts import MANIFEST, SET_ASIDE, ArtifactStore
from pipeline.workflow.runs import RECORD, is_finished, read_run, read_runs, run_artifacts, run_directory
from tests.support.command import said
from tests.support.s3_server import bucket, s3_server
from tests.support.stores import contents, finish, record, there

URL = "s3://bucket/team"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with bucket(server, monkeypatch, tmp_path):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
        yield


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A store with a finished run `first`."""
    outputs = tmp_path / "mine"
    finish(record(outputs, "first").values())
    return outputs


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("s3")
def test_what_was_pushed_to_s3_is_pulled_as_it_was_and_once(mine: Path, tmp_path: Path):
    pushed = said("push", "first", URL, "--outputs", str(mine))
    stages = len(run_artifacts(mine, read_run(mine, "first")))
    assert pushed.count("pushed, ") == stages
    assert said("push", "first", URL, "--outputs", str(mine)).count("is there") == stages
    theirs = tmp_path / "theirs"
    assert said("pull", "first", URL, "--outputs", str(theirs)).count("pulled, ") == stages
    assert contents(theirs, ["artifacts"]) == contents(mine, ["artifacts"])
    assert read_run(theirs, "first") == read_run(mine, "first")
    assert said("pull", "first", URL, "--outputs", str(theirs)).count("  is here") == stages
    assert not list(theirs.glob(f"{PULLING}*"))


def test_a_stopped_pull_goes_on_and_a_push_that_was_stopped_shows_no_artifact(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    there_url, theirs = tmp_path / "there", tmp_path / "theirs"
    push(mine, "first", str(there_url), print)
    (manifest,) = (there_url / "artifacts" / "decoder").glob(f"*/{MANIFEST}")
    held = manifest.rename(manifest.with_name("held"))
    for _ in range(2):
        line = refused(capsys, "pull", "first", str(there_url), "--outputs", str(theirs))
        assert "without decoder, of which a part is lost there; where the run is whole, type unclip push first" in line
    assert "decoder" not in {stage for stage, _ in there(theirs)}
    held.rename(manifest)
    pull(theirs, "first", str(there_url), print)
    assert contents(theirs, ["artifacts"]) == contents(mine, ["artifacts"])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "record"])
def test_what_was_damaged_there_is_named_by_its_address_and_mended_by_the_line_that_says_so(
    mine: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    place, theirs = tmp_path / "there", tmp_path / "theirs"
    push(mine, "first", str(place), print)
    (file,) = (place / "artifacts" / "clip").glob("*/weights.bin")
    if damage in ("manifest", "record"):
        file = file.with_name(MANIFEST) if damage == "manifest" else run_directory(place, "first") / RECORD
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    lines = [refused(capsys, "pull", "first", str(place), "--outputs", str(theirs)) for _ in range(2)]
    for line in lines:
        assert line.startswith(f"unclip: {file} is ")
        assert "clip" not in {stage for stage, _ in there(theirs)}
    is_seen = damage != "flip"  # by the size; to compare digests, push would have to fetch all of it
    again = said("push", "first", str(place), "--outputs", str(mine), *([] if is_seen else ["--anew"]))
    assert is_seen or f"unclip push first {place} --anew" in lines[-1]
    assert again.count("  pushed, ") == {"flip": 6, "record": 0}.get(damage, 1)
    pull(theirs, "first", str(place), print)
    assert contents(theirs, ["artifacts"]) == contents(mine, ["artifacts"])


@pytest.mark.parametrize("kept", ["files", "nothing"])
def test_what_is_finished_there_and_lost_is_no_unfinished_stage(
    mine: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
):
    place, theirs = tmp_path / "there", tmp_path / "theirs"
    push(mine, "first", str(place), print)
    (manifest,) = (place / "artifacts" / "evaluate").glob(f"*/{MANIFEST}")
    manifest.unlink()
    if kept == "nothing":
        shutil.rmtree(next((place / "artifacts" / "clip").iterdir()))
    line = refused(capsys, "pull", "first", str(place), "--outputs", str(theirs))
    assert f"run first is here, without {'evaluate' if kept == 'files' else 'clip, evaluate'}, of which" in line
    push(mine, "first", str(place), print)
    pull(theirs, "first", str(place), print)
    assert contents(theirs, ["artifacts"]) == contents(mine, ["artifacts"])


def test_what_a_pull_has_fetched_is_left_by_gc_and_what_a_power_cut_spoilt_of_it_is_fetched_anew(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, theirs = tmp_path / "there", tmp_path / "theirs"
    push(mine, "first", str(place), print)
    get, collected = RemoteStore.get, []

    def get_and_collect(remote: RemoteStore, name: str, file: Path) -> None:
        if name.startswith("artifacts/decoder/") and not collected:
            collected.append(said("gc", "--delete", "--older-than", "0m", "--outputs", str(theirs)))
            raise KeyboardInterrupt
        get(remote, name, file)

    monkeypatch.setattr(RemoteStore, "get", get_and_collect)
    with pytest.raises(KeyboardInterrupt):
        pull(theirs, "first", str(place), print)
    assert "clip" in {stage for stage, _ in there(theirs)}
    (staging,) = theirs.glob(f"{PULLING}*")
    (fingerprint,) = (each.name for each in (place / "artifacts" / "decoder").iterdir())
    spoilt = ArtifactStore(staging).path("decoder", fingerprint) / "weights.bin"
    spoilt.parent.mkdir(parents=True)
    spoilt.write_bytes(bytes((place / "artifacts" / "decoder" / fingerprint / "weights.bin").stat().st_size))
    pull(theirs, "first", str(place), print)
    assert contents(theirs, ["artifacts"]) == contents(mine, ["artifacts"])


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_pull_mends_what_is_damaged_here(mine: Path, tmp_path: Path, damage: str):
    place, theirs = tmp_path / "there", tmp_path / "theirs"
    push(mine, "first", str(place), print)
    pull(theirs, "first", str(place), print)
    (file,) = (theirs / "artifacts" / "clip").glob("*/weights.bin")
    content = file.read_bytes()
    file.write_bytes(bytes(byte ^ 1 for byte in content) if damage == "flip" else content[:-1])
    said_of_it: list[str] = []
    pull(theirs, "first", str(place), said_of_it.append)
    assert any(each.startswith(str(file)) and each.endswith(": stage clip is fetched anew") for each in said_of_it)
    assert file.read_bytes() == content
    assert is_finished(theirs, read_run(theirs, "first"))


def test_a_store_is_not_pushed_over_itself_nor_over_what_it_links_to(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    linking = tmp_path / "linking"
    record(linking, "second")
    for key in there(mine):
        ArtifactStore(linking, (mine,)).link(*key)
    before = contents(mine, ["artifacts"])
    assert said("push", "second", str(mine), "--outputs", str(linking), "--anew").count("is there, and linked to") == 6
    assert "is the store of run first itself; give" in refused(
        capsys, "push", "first", str(mine), "--outputs", str(mine), "--anew"
    )
    assert contents(mine, ["artifacts"]) == before


@pytest.mark.parametrize("what", ["weights.bin", MANIFEST, RECORD])
def test_a_folder_where_a_file_should_be_there_is_said_in_a_line(
    mine: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
):
    place = tmp_path / "there"
    push(mine, "first", str(place), print)
    folder = place / "runs" if what == RECORD else place / "artifacts" / "clip"
    (file,) = folder.glob(f"*/{what}")
    file.unlink()
    file.mkdir()
    for _ in range(2):
        line = refused(capsys, "pull", "first", str(place), "--outputs", str(tmp_path / "theirs"))
        assert f"{file} is a directory, which is to be removed there; " in line
        assert f"type unclip push first {place} --anew, then pull it again" in line
    again = refused(capsys, "push", "first", str(place), "--outputs", str(mine), "--anew")
    assert f"{file.relative_to(place)} cannot be written: a file or directory is in the way there; remove it" in again
    file.rmdir()
    push(mine, "first", str(place), print, is_anew=True)
    pull(tmp_path / "theirs", "first", str(place), print)


def test_a_push_without_a_stage_that_is_damaged_ends_with_a_line_on_it(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    artifact = run_artifacts(mine, read_run(mine, "first"))["clip"]
    (artifact.path / MANIFEST).rename(artifact.path / SET_ASIDE)
    line = refused(capsys, "push", "first", str(tmp_path / "there"), "--outputs", str(mine))
    assert f"without clip: {artifact.path} was found damaged: stage clip is set aside; run it again with" in line


def test_a_manifest_that_points_out_of_its_folder_is_refused(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = tmp_path / "there"
    push(mine, "first", str(place), print)
    (manifest,) = (place / "artifacts" / "clip").glob(f"*/{MANIFEST}")
    values = json.loads(manifest.read_text())
    values["files"][0]["path"] = "../../../../stolen"
    values.pop("sha256", None)
    manifest.write_text(json.dumps(values))
    theirs = tmp_path / "theirs"
    assert "none of its own" in refused(capsys, "pull", "first", str(place), "--outputs", str(theirs))
    assert not list(tmp_path.rglob("stolen"))


@pytest.mark.usefixtures("s3")
def test_what_cannot_be_is_said_in_a_line(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    at = ["--outputs", str(mine)]
    assert "no run 'x'" in refused(capsys, "push", "x", URL, *at)
    assert "'' is no name of a run" in refused(capsys, "pull", "", URL, *at)
    assert "nothing was pushed there" in refused(capsys, "pull", "first", URL, *at)
    push(mine, "first", URL, print)
    assert "runs there: first" in refused(capsys, "pull", "fist", URL, *at)
    assert "cannot be reached" in refused(capsys, "push", "first", "s3://no-such-bucket/x", *at)
    assert "cannot be reached" in refused(capsys, "push", "first", "nothing://x", *at)
    record(tmp_path / "begun", "first")
    assert "has no finished stage" in refused(capsys, "push", "first", URL, "--outputs", str(tmp_path / "begun"))
    shutil.rmtree(mine / "runs" / "first")
    finish(record(mine, "first", weight=0.9).values())
    assert "another run first is at s3://bucket/team" in refused(capsys, "push", "first", URL, *at)
    assert "another run first is here" in refused(capsys, "pull", "first", URL, *at)
    assert RemoteStore(URL).names_in("runs") == ["first"]


def test_neither_an_empty_address_nor_a_file_for_a_store_is_written_to(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "'' is no address of a store; give one such as" in refused(
        capsys, "push", "first", "", "--outputs", str(mine)
    )
    assert sorted(tmp_path.iterdir()) == before
    file = tmp_path / "file"
    file.touch()
    assert f"--outputs {file} is a file; give a directory" in refused(
        capsys, "pull", "first", str(tmp_path / "remote"), "--outputs", str(file)
    )


def test_a_sweep_is_pushed_and_pulled_by_its_name(tmp_path: Path):
    mine, theirs, place = tmp_path / "mine", tmp_path / "theirs", tmp_path / "there"
    for number, weight in ((2, 0.1), (10, 0.2)):
        finish(record(mine, f"lambda.{number}", "lambda", weight=weight).values())
    finish(record(mine, "other", weight=0.3).values())
    for command, outputs in (("push", mine), ("pull", theirs)):
        lines = said(command, "lambda", str(place), "--outputs", str(outputs)).splitlines()
        assert [line.split()[1] for line in lines if line.startswith("run ")] == ["lambda.2", "lambda.10"]
    assert [each.group for each in read_runs(theirs, "lambda")] == ["lambda", "lambda"]
    assert not run_directory(place, "other").exists()


def test_a_place_that_can_be_no_store_is_refused_before_anything_is_written(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for url, why in (
        (str(mine / "runs"), "is part of the store of run first itself"),
        (str(mine / "artifacts" / "x"), "is part of the store of run first itself"),
        ("memory://x", "is gone when this command ends"),
        ("s3://", "is no address of a store"),
        ("zip://a.zip", "zip://a.zip cannot be "),
    ):
        assert why in refused(capsys, "push", "first", url, "--outputs", str(mine))
    assert sorted(tmp_path.rglob("*")) == before
