"""`unclip export` on a tiny finished run, and what `unclip plan` says of a run that it will refuse."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.compose import compose_members
from pipeline.workflow.plan import plan_run
from pipeline.workflow.runs import record_run
from tests.support import ROOT
from tests.support.command import said
from tests.support.tiny_runs import TINY, run_until, the_last_of_each_key

pytestmark = pytest.mark.usefixtures("one_thread")

V_PREDICTION = "stage.decoder.objective.prediction_type=v_prediction"


def recorded(outputs: Path, name: str, *overrides: str) -> None:
    line = the_last_of_each_key(*TINY, f"paths.outputs={outputs}", f"run.name={name}", *overrides)
    (member,) = compose_members("unclip plan", line)
    record_run(plan_run(member.config, member.overrides))


@pytest.fixture(scope="module")
def finished(outputs: Path) -> Path:
    """`outputs` with a run `tiny` whose networks are there and whose judges are not, and `v` with another decoder."""
    run_until(outputs, "export", "stage.prior.sampler.guidance_scale=1.5")
    recorded(outputs, "tiny", "stage.prior.sampler.guidance_scale=1.5")
    run_until(outputs, "decoder", V_PREDICTION)
    recorded(outputs, "v", "stage.prior.sampler.guidance_scale=1.5", V_PREDICTION)
    recorded(outputs, "undone", "stage.clip.max_samples=24")
    return outputs


def export(outputs: Path, run: str, directory: Path, *options: str) -> int:
    return main(["export", run, str(directory), "--outputs", str(outputs), *options])


def code_of(directory: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "dtype", "files"),
    [
        ("diffusers", "fp32", ["model_index.json", "image_encoder", "text_to_image.py"]),
        ("diffusers", "bf16", ["model_index.json", "feature_extractor", "image_variation.py"]),
        ("open_clip", "fp16", ["open_clip_config.json", "open_clip_model.safetensors"]),
        ("transformers", "fp32", ["model.safetensors", "tokenizer.json", "processor_config.json"]),
    ],
)
def test_the_code_of_the_card_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, files: list[str]
):
    place = tmp_path / "it"
    assert export(finished, "tiny", place, "--format", kind, "--dtype", dtype) == 0
    record = json.loads((place / "export.json").read_text())
    assert (record["run"], record["format"], record["dtype"]) == ("tiny", kind, dtype)
    assert {*files, "README.md", "configs"} <= {each.name for each in place.iterdir()}
    card = (place / "README.md").read_text()
    assert "license: unknown" in card
    assert "R@1" in card
    assert str(tmp_path) not in card
    assert str(finished) not in card
    monkeypatch.chdir(place)
    found = code_of(place)
    assert len(found) == (2 if kind == "diffusers" else 1)
    for code in found:
        exec(compile(code, "README.md", "exec"), {})
    if kind == "diffusers":
        assert "prior_guidance_scale=1.5" in found[0]
        assert {Image.open(place / name).size for name in ("picture.png", "variation.png")} == {(64, 64)}


def test_the_examples_of_the_documentation_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "docs" / "exporting.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    unclip (export .*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main([*command.replace(" demo ", " tiny ").split(), "--outputs", str(finished)]) == 0
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 4
    for code in codes:
        exec(compile(code, "exporting.md", "exec"), {})


def test_the_stage_writes_the_same_as_the_command(finished: Path, tmp_path: Path):
    assert export(finished, "tiny", tmp_path / "it", "--format", "diffusers") == 0
    (artifact,) = (path.parent for path in finished.glob("artifacts/export/*/manifest.json"))
    for path in (tmp_path / "it").rglob("*"):
        if path.is_file() and path.name not in ("README.md", "export.json"):
            assert (artifact / path.relative_to(tmp_path / "it")).read_bytes() == path.read_bytes(), path
    assert "## Use" in (artifact / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    new, stock = tmp_path / "new", ("--format", "diffusers")
    for run, directory, options, expected in (
        ("none", new, stock, "no run 'none'"),
        ("undone", new, stock, "run undone lacks clip, prior, decoder"),
        ("undone", new, ("--format", "open_clip"), "run undone lacks clip;"),
        ("v", new, stock, "the decoder predicts v"),
        ("tiny", tmp_path / "file", stock, "is a file"),
        ("tiny", tmp_path / "full", stock, "is not empty"),
        ("tiny", Path("/proc/none"), stock, "cannot be written"),
    ):
        assert export(finished, run, directory, *options) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert expected in lines[0]
    assert not new.exists()
    assert export(finished, "v", new, "--format", "open_clip") == 0


def test_a_damaged_artifact_is_not_handed_on(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "outputs"
    shutil.copytree(finished, copy)
    (weights,) = copy.glob("artifacts/clip/*/clip.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert export(copy, "tiny", tmp_path / "it", "--format", "transformers") == 2
    assert "does not have the digest in its manifest" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (V_PREDICTION, "the decoder predicts v"),
        ("stage.prior.schedule.kind=linear", "that of the prior is another"),
        ("~stage.upsampler", "it needs an upsampler"),
    ],
)
def test_a_plan_says_what_the_stock_pipelines_will_not_hold(tmp_path: Path, override: str, reason: str):
    line = the_last_of_each_key(*TINY, f"paths.outputs={tmp_path}", override)
    line = [each for each in line if override != "~stage.upsampler" or not each.startswith("stage.upsampler")]
    text = said("plan", *line)
    (notice,) = [each for each in text.splitlines() if each.startswith("export: ")]
    assert reason in notice
    assert "blocked" not in text


def test_a_plan_says_nothing_of_a_run_that_can_be_exported(tmp_path: Path):
    assert "export: " not in said("plan", *TINY, f"paths.outputs={tmp_path}")
