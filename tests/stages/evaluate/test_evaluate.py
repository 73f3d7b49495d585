"""The judge and the evaluation that leans on it."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.picture_grid import read_layout
from pipeline.workflow.artifacts import Artifact
from stages.evaluate.attributes import AttributeAccuracy
from stages.judge.labels import CLASSES, judge_samples, labels
from stages.judge.network import load_judge
from stages.judge.settings import JudgeDataSettings
from stages.prepare.sources.scenes import ALL_PAIRS, Attribute
from tests.support.tiny_runs import plan_stages, run_until

pytestmark = pytest.mark.usefixtures("one_thread")
JUDGED = ("colour", "shape", "size", "position", "background")


@pytest.fixture(scope="module")
def evaluation(outputs: Path) -> Artifact:
    return run_until(outputs, "evaluate")


OBJECT = {"size": "big", "colour": "blue", "shape": "ring", "position": "top"}


def scene(**changes: object) -> dict[str, object]:
    named = sorted(Attribute)
    return {"objects": [OBJECT], "background": "gray", "unseen": False, "named": named} | changes


def test_labels_are_the_places_of_what_is_true_among_the_classes():
    found = labels(scene())
    assert found is not None
    assert [classes[place] for place, classes in zip(found, CLASSES.values(), strict=True)] == [
        "blue",
        "ring",
        "big",
        "top",
        "gray",
    ]


@pytest.mark.parametrize(
    "attributes",
    [{}, scene(named=["colour", "shape"]), scene(objects=[]), scene(objects=[OBJECT, OBJECT])],
    ids=["no scene", "not all is said", "no object", "two objects"],
)
def test_a_caption_that_leaves_something_open_is_not_judged(attributes: dict[str, object]):
    assert labels(attributes) is None


def test_the_judge_s_pictures_are_single_objects_of_all_pairs_and_held_out_ones_are_others():
    settings = JudgeDataSettings(samples=400, validation_samples=100, image_size=64, seed=0, shard_samples=100)
    made = list(judge_samples(settings))
    pairs = {(item["colour"], item["shape"]) for sample, _ in made for item in sample.attributes["objects"]}
    assert pairs == set(ALL_PAIRS)
    assert all(labels(sample.attributes) is not None for sample, _ in made)
    held_out = {sample.image for sample, split in made if split.value == "validation"}
    assert len(held_out) == 100
    assert not held_out & {sample.image for sample, split in made if split.value == "train"}


@pytest.mark.slow
def test_a_judge_learns_to_read_real_pictures_and_is_no_worse_for_being_saved(outputs: Path):
    artifact = run_until(
        outputs, "judge", "stage.judge.max_samples=20480", "stage.judge.data.samples=2000", "stage.judge.width=12"
    )
    metrics = artifact.manifest.metrics
    assert metrics["colour_at_16"] > 0.9
    assert metrics["background_at_64"] > 0.9
    assert metrics["accuracy_at_16"] > 0.8
    assert load_judge(artifact).read(torch.zeros(3, 3, 64, 64)).shape == (3, len(CLASSES))


def test_evaluate_reports_every_attribute_for_seen_and_unseen_pairs_at_both_resolutions(evaluation: Artifact):
    metrics = evaluation.manifest.metrics
    for group in ("seen", "unseen"):
        for pictures in ("base", "final", "real_base", "real_final"):
            name = f"{group}/{pictures}"
            assert metrics[f"{name}/mean"] == pytest.approx(sum(metrics[f"{name}/{each}"] for each in JUDGED) / 5)
            assert metrics[f"{name}/all_right"] <= min(metrics[f"{name}/{each}"] for each in JUDGED)
            for each in ("mean", "all_right", *JUDGED):
                assert metrics[f"{name}/{each}_low"] <= metrics[f"{name}/{each}"] <= metrics[f"{name}/{each}_high"]
    table = (evaluation.path / "attributes.md").read_text()
    assert table.splitlines()[0].startswith("| pictures | mean | all right | colour |")
    assert len(table.splitlines()) == 2 + 8


def test_evaluate_draws_a_grid_of_validation_captions(evaluation: Artifact):
    assert evaluation.manifest.numbers == {"samples": 6 + 2 * 4}
    with Image.open(evaluation.path / "grid.png") as grid:
        assert grid.size[0] >= 4 * 3 * 64


def test_evaluate_measures_each_network_by_itself(evaluation: Artifact):
    metrics = evaluation.manifest.metrics
    assert {"clip/R@1/all", "prior/to_image", "prior/to_other_image", "prior/to_caption"} <= metrics.keys()
    assert {"upsampler/psnr_db", "upsampler/psnr_bicubic_db"} <= metrics.keys()
    assert metrics["upsampler/psnr_bicubic_db"] > 15


def test_a_clip_that_trained_nothing_judges_too(evaluation: Artifact):
    metrics = evaluation.manifest.metrics
    assert {"sample_to_caption", "real_to_caption", "sample_to_real", "sample_R@1/all"} <= metrics.keys()
    assert metrics["judge_clip/sample_to_caption"] != metrics["sample_to_caption"]
    assert metrics["judge_clip/frechet"] > 0
    assert metrics["judge_clip/frechet_of_real"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage.evaluate.metrics=[fid]"], "neither given by stage.evaluate.encoders.inception nor in"),
        (["stage.evaluate.metrics=[cmmd]"], "give where it is by stage.evaluate.encoders.open_clip"),
        (["stage.evaluate.metrics=[fid@judge_clip]", "~stage.judge_clip"], "the workflow no stage judge_clip"),
        (["stage.evaluate.classes=/nowhere"], "stage.evaluate.classes /nowhere is no directory"),
    ],
)
def test_what_evaluate_will_lack_is_said_when_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message):
        plan_stages(tmp_path, *overrides)


def test_an_encoder_s_file_counts_by_its_contents(tmp_path: Path):
    def fingerprint(name: str, bias: float) -> str:
        weights = {"fc.weight": torch.zeros(1).expand(1008, 2048), "fc.bias": torch.tensor([bias])}
        torch.save(weights, content := io.BytesIO())
        (tmp_path / name).write_bytes(content.getvalue())
        chosen = ["stage.evaluate.metrics=[fid]", f"stage.evaluate.encoders.inception={tmp_path / name}"]
        return plan_stages(tmp_path, *chosen)["evaluate"].fingerprint

    assert fingerprint("one", 0.5) == fingerprint("moved", 0.5) != fingerprint("other", 0.25)


def test_without_judges_evaluate_says_less(outputs: Path):
    metrics = run_until(outputs, "evaluate", "~stage.judge", "~stage.judge_clip").manifest.metrics
    assert not any(name.startswith(("seen/", "unseen/", "judge_clip/")) for name in metrics)
    assert {"sample_to_caption", "clip/R@1/all"} <= metrics.keys()


def test_attribute_accuracy_counts_a_picture_as_all_right_only_if_every_attribute_is():
    accuracy = AttributeAccuracy()
    accuracy.add("seen/base", torch.tensor([[True] * 5, [True, False, True, True, True]]))
    accuracy.add("seen/base", torch.tensor([[False] * 5, [True] * 5]))
    estimates = accuracy.estimates()["seen/base"]
    assert estimates["all_right"].value == 0.5
    assert estimates["shape"].value == 0.5
    assert estimates["mean"].value == pytest.approx(14 / 20)


def test_the_grid_says_which_caption_seed_and_picture_is_where(evaluation: Artifact):
    with Image.open(evaluation.path / "grid.png") as image:
        layout = read_layout(image)
    assert layout is not None
    assert layout.pictures == ("real", "base", "final")
    assert layout.sizes == (64, 16, 64)
    assert len(layout.captions) == len(layout.seeds) == len(layout.boxes) > 1
    assert len(set(layout.seeds)) == len(layout.seeds)
