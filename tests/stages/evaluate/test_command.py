"""`unclip evaluate` on a tiny run that is finished."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.cli import EXIT_USER_ERROR, main
from pipeline.compose import compose_members
from pipeline.config import validate
from pipeline.data.indexing import index_place
from pipeline.data.place import ShardPlace
from pipeline.data.write import SourceSample, write_shards
from pipeline.errors import UserError
from pipeline.workflow.plan import plan_run
from pipeline.workflow.runs import record_run
from stages.generation.load import require_sampled
from stages.generation.options import GenerationOptions
from tests.support.command import said
from tests.support.tiny_runs import TINY, run_until, the_last_of_each_key

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(outputs: Path) -> Path:
    """A run `whole` with all stages but the export, and a run `clip` that has no more than a CLIP."""
    for name, without in (("whole", ["~stage.export"]), ("clip", ONLY_CLIP)):
        base = [
            each for each in TINY if name == "whole" or each.split(".")[0] != "stage" or each.startswith("stage.clip.")
        ]
        overrides = the_last_of_each_key(*base, *without, f"run.name={name}", f"paths.outputs={outputs}")
        (member,) = compose_members("unclip plan", overrides)
        plan = plan_run(member.config, member.overrides)
        run_until(outputs, plan.stages[-1].name, *without, base=base)
        record_run(plan)
    return outputs


ONLY_CLIP = [
    f"~stage.{stage}"
    for stage in ("embed", "prior", "decoder", "upsampler", "judge", "judge_clip", "evaluate", "export")
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")

    def sample(number: int) -> SourceSample:
        path = directory / "picture.png"
        Image.effect_noise((40, 32), 10 + 5 * number).convert("RGB").save(path)
        content = path.read_bytes()
        path.unlink()
        return SourceSample(f"{number:03}", content, "png", f"noise {number}", {})

    write_shards(directory, map(sample, range(5)), 5)
    (indexed,) = index_place(ShardPlace(shards=(str(directory),)), workers=0)
    assert indexed.refused == ()
    return directory


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classes")
    for name, colour in (("red_square", "red"), ("blue_square", "blue")):
        (directory / name).mkdir()
        for number in range(3):
            Image.new("RGB", (20 + number, 24), colour).save(directory / name / f"{number}.png")
    return directory


def evaluated(outputs: Path, *arguments: str, run: str = "whole") -> Mapping[str, Any]:
    before = set((outputs / "runs" / run / "evaluations").glob("*.json"))
    text = said("evaluate", run, "--outputs", str(outputs), *arguments)
    (path,) = set((outputs / "runs" / run / "evaluations").glob("*.json")) - before
    assert str(path) in text.replace("\n", "")
    return json.loads(path.read_text())


def refused(outputs: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["evaluate", *arguments, "--outputs", str(outputs)]) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("unclip: ")
    assert message.count("\n") == 1
    return message


def test_a_run_is_measured_as_its_own_evaluation_was(finished: Path):
    artifact = run_until(finished, "evaluate", "~stage.export")
    (metrics,) = evaluated(finished)["points"].values()
    assert metrics == pytest.approx(artifact.manifest.metrics, rel=1e-5, nan_ok=True)


def test_chosen_metrics_in_chosen_encoders_are_measured_alone(finished: Path):
    record = evaluated(finished, "--metrics", "fid@judge_clip,cmmd@clip,clip_score@judge_clip", "--samples", "5")
    (metrics,) = record["points"].values()
    assert list(metrics)[:2] == ["judge_clip/fid", "clip/cmmd"]
    assert all(name.startswith(("judge_clip/fid", "clip/cmmd", "judge_clip/clip_score")) for name in metrics)
    assert record["data"].startswith("validation pictures of prepare/")
    assert record["settings"]["samples"] == 5


def test_retrieval_and_pictures_on_any_indexed_shards(finished: Path, shards: Path):
    record = evaluated(finished, "--data", str(shards), "--metrics", "retrieval,clip_score@clip")
    (metrics,) = record["points"].values()
    assert {"clip/R@1/all", "clip/clip_score", "clip/clip_score_of_real"} <= metrics.keys()
    assert metrics["clip/R@5/all"] == 1, "of five"
    assert record["data"] == [str(shards)]


def test_a_run_that_makes_no_pictures_is_measured_by_its_clip(finished: Path, classes: Path):
    (metrics,) = evaluated(finished, "--classes", str(classes), run="clip")["points"].values()
    assert {"clip/R@1/all", "zero_shot/top1", "zero_shot/top1_low"} <= metrics.keys()
    assert {name.split("/")[0] for name in metrics} == {"clip", "zero_shot"}


def test_a_sweep_is_a_record_with_a_point_for_each_value_a_plot_and_a_part_of_the_card(finished: Path):
    record = evaluated(finished, "--metrics", "similarity,prior", "--sweep", "guidance=1,3", "--samples", "4")
    assert list(record["points"]) == ["guidance=1", "guidance=3"]
    one, three = record["points"].values()
    assert one.keys() == three.keys()
    assert one["sample_to_caption"] != three["sample_to_caption"]
    assert one["prior/to_image"] == three["prior/to_image"], "the prior is guided otherwise by another name"
    plot = finished / "runs" / "whole" / "evaluations" / record["plot"]
    with Image.open(plot) as image:
        assert image.format == "PNG"
    said("card", "whole", "--outputs", str(finished))
    card = (finished / "runs" / "whole" / "README.md").read_text()
    assert f"(<evaluations/{plot.name}>)" in card
    assert "| metric | guidance=1 | guidance=3 |" in card
    compared = json.loads(said("compare", "whole", "--outputs", str(finished), "--json"))
    (rows,) = [each["rows"] for each in compared["evaluations"] if ", 4 samples" in each["conditions"]]
    assert {row["point"]: row["values"]["prior/to_image"] for row in rows}["guidance=3"] == three["prior/to_image"]


@pytest.mark.parametrize(
    "sweep", ["steps=1,2", "eta=0,1", "prior_steps=1,2", "upsampler_steps=1,2", "prior_guidance=1,2"]
)
def test_every_part_of_the_chain_can_be_swept(finished: Path, sweep: str):
    points = evaluated(finished, "--metrics", "clip_score@clip", "--sweep", sweep, "--samples", "3")["points"]
    one, other = points.values()
    assert one["clip/clip_score"] != other["clip/clip_score"]
    assert one["clip/clip_score_of_real"] == other["clip/clip_score_of_real"]


def test_several_runs_are_shown_side_by_side(finished: Path):
    text = said("evaluate", "whole", "clip", "--outputs", str(finished), "--metrics", "retrieval")
    assert [line.split()[1:-1:2] for line in text.splitlines() if "metric" in line] == [["metric", "whole", "clip"]]
    assert "clip/R@1/all" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no run 'nobody'"),
        (["whole", "--metrics", "fod"], "--metrics fod: 'fod' is no metric; there are .*, retrieval"),
        (["whole", "--metrics", "fid@dino"], "there are clip, judge_clip, inception, dinov2, open_clip$"),
        (["whole", "--metrics", "cmmd", "--open-clip", __file__], "does not say of which model; set --open-clip-model"),
        (["whole", "--metrics", "fid"], "FID's Inception is neither given by --inception nor in .*hub/checkpoints as"),
        (["whole", "--metrics", "cmmd"], "a metric needs the encoder open_clip; give where it is by --open-clip"),
        (["whole", "--metrics", "fd_dinov2", "--dinov2", "/nowhere"], "--dinov2 /nowhere does not exist"),
        (["whole", "--metrics", "zero_shot"], "give --classes"),
        (["whole", "--classes", "/nowhere"], "--classes /nowhere is no directory"),
        (["whole", "--samples", "0"], "--samples 0 is none"),
        (["whole", "--sweep", "speed=1,2"], "'speed' cannot be swept; there are guidance"),
        (["whole", "--sweep", "guidance=2"], "is no curve"),
        (["whole", "--sweep", "guidance=one,two"], "give numbers"),
        (["whole", "--sweep", "guidance=1,nan"], "guidance"),
        (["whole", "--sweep", "steps=1,2.5"], "steps"),
        (["whole", "--sweep", "steps=1,5000"], "steps 5000 is more than the schedule's"),
        (["whole", "--sweep", "guidance=1,2", "--metrics", "retrieval"], "retrieval does not depend on"),
        (["whole", "--data", "/nowhere"], "/nowhere"),
        (["clip", "--metrics", "similarity"], "the run has no finished decoder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = refused(finished, capsys, *arguments)
    assert re.search(message, text), text


def test_an_evaluation_that_cannot_be_written_is_refused_before_it_is_made(
    finished: Path, capsys: pytest.CaptureFixture[str]
):
    place = finished / "runs" / "clip" / "evaluations"
    moved = place.rename(place.with_name("moved")) if place.exists() else None
    place.touch()
    assert "evaluations cannot be written" in refused(finished, capsys, "clip", "--metrics", "retrieval")
    place.unlink()
    if moved is not None:
        moved.rename(place)


def test_samplers_that_the_networks_of_a_run_cannot_have_are_refused_before_these_are_loaded(finished: Path):
    require_sampled("whole", finished, GenerationOptions())
    with pytest.raises(UserError, match=r"upsampler\.steps 5000 is more than"):
        require_sampled("whole", finished, validate(GenerationOptions, {"upsampler": {"steps": 5000}}))
    with pytest.raises(UserError, match="trains no decoder"):
        require_sampled("clip", finished, GenerationOptions())
