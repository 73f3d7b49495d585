"""Every file of conf/ composes and validates."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.compose import CONFIG_DIRECTORY, compose_members
from pipeline.workflow.plan import Action, Plan, plan_run

EXPERIMENTS = sorted((CONFIG_DIRECTORY / "experiment").glob("*.yaml"))
MODEL_PLACES = {
    "clip": "model/clip@stage.clip.network",
    "prior": "model/prior@stage.prior.network",
}


def options(group: str) -> list[str]:
    found = sorted(path.stem for path in (CONFIG_DIRECTORY / group).glob("*.yaml"))
    assert found, f"conf/{group} is empty"
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str) -> Plan:
    (member,) = compose_members("unclip plan", list(arguments))
    made = plan_run(member.config, member.overrides)
    assert {stage.action for stage in made.stages} == {Action.RUN}
    return made


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_composes_and_plans_under_a_name_of_its_own(path: Path, tmp_path: Path):
    arguments = [f"experiment={path.stem}"]
    if "/data: webdataset" in path.read_text(encoding="utf-8"):
        write_tar(tmp_path / "shards" / "00000.tar")
        assert main(["shards", "index", str(tmp_path / "shards")]) == 0
        # Batches of its own size would need as many samples.
        arguments += [f"data.shards={tmp_path / 'shards'}", "stage.clip.global_batch_size=256"]
    assert plan(*arguments).config.run.name != "demo"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_says_its_command_hardware_time_and_score(path: Path):
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    text = "\n".join(header)
    assert f"# unclip run experiment={path.stem}" in text
    assert "Hardware" in text
    assert "unmeasured" in text or ("time" in text.lower() and "score" in text.lower())


@pytest.mark.parametrize("option", options("workflow"))
def test_every_workflow_plans_down_to_the_export(option: str):
    made = plan(f"workflow={option}")
    assert made.stages[0].kind == "prepare"
    assert made.stages[-1].kind == "export"


@pytest.mark.parametrize("group", ["trainer", "launch", "tracking"])
def test_every_option_of_the_run_s_groups_plans(group: str):
    for option in options(group):
        plan(f"{group}={option}")


@pytest.mark.parametrize("option", [option for option in options("data") if option != "webdataset"])
def test_every_built_in_source_plans(option: str):
    made = plan(f"data={option}")
    assert made.config.data["source"] == option


def test_the_user_s_own_shards_plan_once_they_are_indexed(tmp_path: Path):
    write_tar(tmp_path / "shards" / "00000.tar")
    assert main(["shards", "index", str(tmp_path / "shards")]) == 0
    made = plan("data=webdataset", f"data.shards={tmp_path / 'shards'}")
    assert made.config.data["source"] == "webdataset"


def test_shards_that_are_moved_keep_their_fingerprint_and_changed_ones_do_not(tmp_path: Path):
    def fingerprint(directory: Path) -> str | None:
        return plan("data=webdataset", f"data.shards={directory}").stages[0].fingerprint

    write_tar(tmp_path / "here" / "00000.tar")
    assert main(["shards", "index", str(tmp_path / "here")]) == 0
    before = fingerprint(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert fingerprint(tmp_path / "there") == before
    write_tar(tmp_path / "there" / "00001.tar")
    assert main(["shards", "index", str(tmp_path / "there")]) == 0
    assert fingerprint(tmp_path / "there") != before


@pytest.mark.parametrize("family", sorted(MODEL_PLACES))
def test_every_size_of_a_network_that_stands_in_one_place_composes(family: str):
    for option in options(f"model/{family}"):
        (member,) = compose_members("unclip plan", [f"{MODEL_PLACES[family]}={option}"])
        assert member.config.stage[family]["network"]


@pytest.mark.parametrize("option", options("model/unet"))
def test_every_u_net_is_chosen_for_the_stage_that_it_is_named_after(option: str):
    stage = "upsampler" if "upsampler" in option else "decoder"
    (member,) = compose_members("unclip plan", [f"model/unet@stage.{stage}.network={option}"])
    network = member.config.stage[stage]["network"]
    assert len(network["channels"]) == len(network["attention"])


@pytest.mark.parametrize("path", sorted((CONFIG_DIRECTORY / "stage").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_stage_file_stands_in_a_workflow(path: Path):
    (member,) = compose_members("unclip plan", [])
    assert path.stem in {stage["kind"] for stage in member.config.stage.values()}


def write_tar(path: Path) -> None:
    """700 samples: enough for two batches of the demo's CLIP, and for a hundredth to measure on."""
    path.parent.mkdir(exist_ok=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w") as archive:
        for number in range(700):
            key = f"{path.stem}{number:04d}"
            for name, content in ((f"{key}.png", picture.getvalue()), (f"{key}.txt", b"a black square")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
