from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.report.records import Comparison
from pipeline.report.sweep import best_levels, chosen_metric, effects, settings
from pipeline.workflow.declaration import Better
from tests.support import small_world
from tests.support.small_world import compared


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two weights and two notes, two seeds each; the metrics follow the weight alone."""
    outputs = tmp_path_factory.mktemp("crossed")
    number = 0
    for weight in (0.3, 0.1):
        for note in ("a", "b"):
            for seed in (0, 1):
                overrides = [
                    "run.name=c",
                    f"stage.painter.weight={weight}",
                    f"stage.painter.note={note}",
                    f"seed={seed}",
                ]
                name = f"c.{number}"
                small_world.run(outputs, name, group="c", overrides=overrides, seed=seed, weight=weight, note=note)
                number += 1
    return compared(outputs, "sweep:c")


def test_each_parameter_s_effect_is_averaged_over_all_that_else_was_varied(crossed: Comparison):
    weight, note, seed = effects(crossed, "painter.accuracy")
    assert [(level.label, level.runs, level.mean) for level in weight.levels] == [
        ("0.1", 4, pytest.approx(0.55)),
        ("0.3", 4, pytest.approx(0.65)),
    ]
    assert weight.levels[0].deviation == pytest.approx(0)
    assert [level.mean for level in note.levels] == pytest.approx([0.6, 0.6])
    assert note.levels[0].deviation == pytest.approx(0.0577, abs=1e-3)
    assert (seed.parameter, seed.is_numeric, note.is_numeric) == ("seed", True, False)
    assert [level.label for level in best_levels(weight, Better.HIGH)] == ["0.3"]
    assert best_levels(weight, None) == ()


def test_members_that_differ_in_their_seed_alone_stand_together(crossed: Comparison):
    by_setting = settings(crossed, "painter.accuracy")
    assert by_setting is not None
    assert [(level.label, level.runs) for level in by_setting.levels] == [
        ("painter.weight=0.3, painter.note=a", 2),
        ("painter.weight=0.3, painter.note=b", 2),
        ("painter.weight=0.1, painter.note=a", 2),
        ("painter.weight=0.1, painter.note=b", 2),
    ]


def test_members_that_share_a_stage_have_measured_it_once(tmp_path: Path):
    number = 0
    for weight in (0.1, 0.3):
        for strictness in (0.5, 0.75, 1.0):
            overrides = [f"stage.painter.weight={weight}", f"stage.critic.strictness={strictness}"]
            small_world.run(
                tmp_path, f"s.{number}", group="s", overrides=overrides, weight=weight, strictness=strictness
            )
            number += 1
    sweep = compared(tmp_path, "sweep:s")
    weight, strictness = effects(sweep, "painter.accuracy")
    assert [(level.count, level.mean, level.deviation) for level in weight.levels] == [
        ("3 on 1 stage", 0.55, None),
        ("3 on 1 stage", 0.65, None),
    ]
    assert [point.runs for point in weight.levels[0].points] == [(0, 1, 2)]
    assert [level.count for level in strictness.levels] == ["2", "2", "2"]
    score, _ = effects(sweep, "critic.score")
    assert [level.count for level in score.levels] == ["3", "3"]
    assert score.levels[0].deviation is not None


def test_levels_that_tie_are_all_marked(tmp_path: Path, capsys):
    for number, (weight, note) in enumerate(((0.1, "a"), (0.3, "b"), (0.3, "c"))):
        overrides = [f"stage.painter.note={note}"]
        small_world.run(tmp_path, f"t.{number}", group="t", overrides=overrides, weight=weight, note=note)
    (note,) = effects(compared(tmp_path, "sweep:t"), "painter.accuracy")
    assert [level.label for level in best_levels(note, Better.HIGH)] == ["b", "c"]
    assert main(["compare", "sweep:t", "--metric", "painter.accuracy", "--outputs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.split("painter.accuracy (high is better)")[1]
    assert shown.count("0.65 *") == 2


@pytest.mark.parametrize("metric", ["painter.time_s", "painter.device_hours", "painter.samples_seen"])
def test_effects_on_time_cost_and_samples_can_be_asked_for(outputs: Path, capsys, tmp_path: Path, metric: str):
    options = ["--metric", metric, "--outputs", str(outputs), "--output", str(tmp_path / "report.html")]
    assert main(["compare", "sweep:trial", *options]) == 0
    shown = capsys.readouterr().out
    assert metric + ("" if metric.endswith("seen") else " (low is better)") in shown


def test_the_metric_is_the_last_stage_s_unless_another_is_asked_for(trial: Comparison):
    assert chosen_metric(trial, None) == "critic.score"
    assert chosen_metric(trial, "painter.error") == "painter.error"
    with pytest.raises(UserError, match=r"'painter.joy' is no final metric .* critic.score, painter.error"):
        chosen_metric(trial, "painter.joy")


def test_the_terminal_shows_the_effect_of_a_sweep_on_the_chosen_metric(outputs: Path, capsys):
    assert main(["compare", "sweep:trial", "--metric", "painter.error", "--outputs", str(outputs)]) == 0
    shown = capsys.readouterr().out
    assert "painter.error (low is better)" in shown
    assert "stage.painter.weight" in shown
    assert "0.025 *" in shown
