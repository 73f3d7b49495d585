"""What every command says of a store of which something is damaged, and that what it says mends it."""

import io
import shlex
import shutil
import time
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console

from pipeline.cli import main
from pipeline.config import OnDamage, StoreSettings
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.terminal.tables import stage_state
from pipeline.workflow.artifacts import MANIFEST, SET_ASIDE, Artifact, ArtifactStore
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.digests import file_sha256
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.ownership import acquire
from pipeline.workflow.plan import Action, Plan, plan_run
from pipeline.workflow.progress import Phase, Progress, write_progress
from pipeline.workflow.runs import RECORD, finished_artifacts, read_run, run_artifacts, run_directory
from pipeline.workflow.sealed import write_json_atomically
from tests.support.command import said
from tests.support.fakes import publish, run_config
from tests.support.stores import record, settings, there


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A store with a finished run `first`, and `second` that has another decoder."""
    for stage in (*record(tmp_path, "first").values(), record(tmp_path, "second", weight=0.2)["decoder"]):
        assert stage.frozen is not None
        write_frozen(stage.frozen)
        publish(stage)
    return tmp_path


@pytest.fixture
def clip(outputs: Path) -> Artifact:
    return run_artifacts(outputs, read_run(outputs, "first"))["clip"]


def planned(outputs: Path, on_damage: OnDamage) -> Plan:
    return plan_run(run_config(outputs, settings(), store=StoreSettings(on_damage=on_damage)))


def action_of_clip(plan: Plan) -> tuple[Action, str]:
    return next((stage.action, stage.reason) for stage in plan.stages if stage.name == "clip")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status of a command, and all that it printed, in one line."""
    status = main(arguments)
    found = capsys.readouterr()
    return status, " ".join(f"{found.out} {found.err}".split())


def flip(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def test_a_stage_that_lost_its_manifest_is_no_new_one(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    held = (clip.path / MANIFEST).rename(outputs / "held")
    line = f"{clip.path / MANIFEST} is gone"
    assert action_of_clip(planned(outputs, OnDamage.STOP)) == (
        Action.BLOCKED,
        f"{line}; run it again with store.on_damage=rebuild to make it anew, or put an intact copy of the file there, "
        f"and this takes it back: unclip verify --all --outputs {outputs}",
    )
    action, reason = action_of_clip(planned(outputs, OnDamage.REBUILD))
    assert action is not Action.REUSE
    assert line in reason
    assert shown(capsys, "verify", "first", "--outputs", str(outputs))[0] == 2
    assert "damaged" in said("status", "first", "--outputs", str(outputs))
    held.rename(clip.path / MANIFEST)
    assert action_of_clip(planned(outputs, OnDamage.STOP))[0] is Action.REUSE


def test_of_a_stage_that_is_set_aside_every_command_names_the_file(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    file = clip.path / "weights.bin"
    flip(file)
    for _ in range(2):
        status, text = shown(capsys, "verify", "first", "--outputs", str(outputs))
        assert (status, text.count(f"{file} does not have the digest")) == (2, 1)
    stage = next(each for each in read_run(outputs, "first").stages if each.name == "clip")
    state, detail = stage_state(ArtifactStore(outputs), stage)
    assert (state, str(file) in detail) == ("damaged", True)
    assert str(file) in action_of_clip(planned(outputs, OnDamage.STOP))[1]
    with pytest.raises(DamagedArtifactError, match=rf"{file} .*: stage clip is set aside; .*on_damage=rebuild"):
        finished_artifacts(outputs, read_run(outputs, "first"), [clip.manifest.kind], "sample")
    for kinds in ((), ["another"]):
        with pytest.raises(DamagedArtifactError):
            finished_artifacts(outputs, read_run(outputs, "first"), kinds, "evaluate", also=[clip.manifest.kind])
    flip(file)
    with pytest.raises(DamagedArtifactError) as refusal:
        finished_artifacts(outputs, read_run(outputs, "first"), [clip.manifest.kind], "sample")
    typed = shlex.split(str(refusal.value).partition("this takes it back: unclip ")[2])
    assert "taken back" in said(*typed)


def test_a_manifest_that_was_put_back_leaves_no_other_beside_it(outputs: Path, clip: Artifact):
    content = (clip.path / MANIFEST).read_bytes()
    (clip.path / MANIFEST).rename(clip.path / SET_ASIDE)
    (clip.path / MANIFEST).write_bytes(content)
    said("verify", "first", "--outputs", str(outputs))
    assert not (clip.path / SET_ASIDE).exists()


@pytest.mark.parametrize("content", [b"\xff", b'{"a": NaN}', b'{"schema_version": 1, "stage": 2}', None])
def test_a_manifest_that_is_damaged_stops_no_command_that_looks(
    outputs: Path, clip: Artifact, content: bytes | None, capsys: pytest.CaptureFixture[str]
):
    (clip.path / MANIFEST).unlink()
    if content is None:
        (clip.path / MANIFEST).mkdir()
    else:
        (clip.path / MANIFEST).write_bytes(content)
    for arguments in (["status", "first"], ["compare", "first", "second"], ["card", "first"], ["du"]):
        status, text = shown(capsys, *arguments, "--outputs", str(outputs))
        assert status == 0
        assert "damaged" in text or arguments == ["du"]
    assert shown(capsys, "verify", "--all", "--outputs", str(outputs))[0] == 2
    assert action_of_clip(planned(outputs, OnDamage.REBUILD))[0] is Action.RUN


def test_a_card_of_a_run_that_is_damaged_says_so_first(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    (clip.path / "weights.bin").write_bytes(b"")
    _, text = shown(capsys, "card", "first", "--outputs", str(outputs))
    assert f"stage clip is damaged: {clip.path / 'weights.bin'} has 0 bytes" in text
    assert ": damaged, 5 of 6 stages done" in (run_directory(outputs, "first") / "README.md").read_text()


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


def test_a_manifest_that_is_a_link_to_itself_is_damage(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    manifest, at = clip.path / MANIFEST, ["--outputs", str(outputs)]
    manifest.unlink()
    manifest.symlink_to(MANIFEST)
    for _ in range(2):
        status, text = shown(capsys, "verify", "--all", *at)
        assert (status, f"{manifest} cannot be read (it is a link to itself)" in text) == (2, True)
    assert action_of_clip(planned(outputs, OnDamage.STOP))[0] is Action.BLOCKED
    assert action_of_clip(planned(outputs, OnDamage.REBUILD))[0] is Action.RUN


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
        status, text = shown(capsys, "verify", "first", "--outputs", str(outputs))
        assert (status, f"{damaged} is damaged and passed over; {instead}" in text) == (2, True)


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


def test_the_manifest_of_another_artifact_of_the_stage_is_damage(outputs: Path, capsys: pytest.CaptureFixture[str]):
    """As when the copy of a wrong one is put back."""
    first, second = (run_artifacts(outputs, read_run(outputs, name))["decoder"] for name in ("first", "second"))
    for each in second.path.iterdir():
        shutil.copy(each, first.path / each.name)
    at = ("--outputs", str(outputs))
    line = f"{first.path / MANIFEST} is the one of {second.name}"
    assert "damaged" in said("status", "first", *at)
    status, text = shown(capsys, "verify", "first", *at)
    assert status == 2
    assert line in text
    store = ArtifactStore(outputs)
    assert store.readable("decoder", first.manifest.fingerprint) is None
    assert store.own("decoder", second.manifest.fingerprint) is not None


def test_an_artifact_of_which_no_work_folder_tells_is_missed_as_others_were_made_from_it(
    outputs: Path, clip: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As in a store that an earlier version pulled."""
    pulled = pulled_from(outputs, tmp_path)
    shutil.rmtree(pulled / "work")
    at = ("--outputs", str(pulled))
    assert shown(capsys, "verify", "first", *at)[0] == 0
    place = ArtifactStore(pulled).path("clip", clip.manifest.fingerprint)
    place.rename(tmp_path / "held")
    for arguments in (("verify", "first", *at), ("verify", "--all", *at)):
        status, text = shown(capsys, *arguments)
        assert status == 2
        assert f"{place} is gone; put it back, or run again to make it anew" in text
    (tmp_path / "held").rename(place)
    assert shown(capsys, "verify", "--all", *at)[0] == 0


@pytest.mark.parametrize("stage", ["clip", "decoder"])
def test_an_artifact_that_was_pulled_and_taken_away_is_missed_by_every_command(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
):
    pulled = pulled_from(outputs, tmp_path)
    (place,) = (pulled / "artifacts" / stage).iterdir()
    place.rename(tmp_path / "held")
    at = ("--outputs", str(pulled))
    status, text = shown(capsys, "verify", "first", *at)
    assert (status, f"{place} is gone; put it back, or run again to make it anew" in text) == (2, True)
    assert f"{stage} " in next(line for line in said("status", "first", *at).splitlines() if "damaged" in line)
    plan = {each.name: each for each in planned(pulled, OnDamage.STOP).stages}
    assert (plan[stage].action, plan[stage].reason) == (Action.RUN, f"anew, as {place} is gone")
    assert "pulled" in said("pull", "first", str(tmp_path / "remote"), *at)
    assert shown(capsys, "verify", "first", *at)[0] == 0


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


def test_push_does_not_call_an_artifact_that_was_taken_away_unfinished(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pulled = pulled_from(outputs, tmp_path)
    (place,) = (pulled / "artifacts" / "decoder").iterdir()
    shutil.rmtree(place)
    status, text = shown(capsys, "push", "first", str(tmp_path / "another"), "--outputs", str(pulled))
    assert (status, f"without decoder: {place} is gone; put it back, or run again" in text) == (2, True)


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
    place = planned(outputs, OnDamage.STOP).code.keep(outputs)
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
    planned(outputs, OnDamage.STOP).code.keep(outputs)
    assert shown(capsys, "verify", "--all", *at)[0] == 0


def pulled_from(outputs: Path, beside: Path) -> Path:
    """Another store, to which the run was pulled."""
    said("push", "first", str(beside / "remote"), "--outputs", str(outputs))
    said("pull", "first", str(beside / "remote"), "--outputs", str(beside / "pulled"))
    return beside / "pulled"


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
    start([planned(outputs, OnDamage.STOP)], Display(Console(file=io.StringIO())), waits=True)
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


def test_an_artifact_that_was_taken_away_is_missed_by_every_command(
    outputs: Path, clip: Artifact, capsys: pytest.CaptureFixture[str]
):
    work = ArtifactStore(outputs).work("clip", clip.manifest.fingerprint)
    owner = acquire(work, 60.0, Event())
    write_progress(work, Progress(Phase.PUBLISHING, updated_at=time.time()))
    owner.release()
    shutil.rmtree(clip.path)
    at = ("--outputs", str(outputs))
    for arguments in (("verify", "first", *at), ("verify", "--all", *at)):
        status, text = shown(capsys, *arguments)
        assert status == 2
        assert f"{clip.path} is gone; put it back, or run again to make it anew" in text
    assert "damaged" in said("status", "first", *at)
    assert action_of_clip(planned(outputs, OnDamage.STOP)) == (Action.RUN, f"anew, as {clip.path} is gone")
