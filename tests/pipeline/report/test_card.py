import shutil
from pathlib import Path

from markdown_it import MarkdownIt

from pipeline.cli import main
from tests.support import small_world


def card_of(outputs: Path, name: str, capsys, *options: str) -> tuple[Path, str]:
    assert main(["card", name, "--outputs", str(outputs), *options]) == 0
    path = Path(capsys.readouterr().out.removeprefix("card: ").strip())
    return path, path.read_text(encoding="utf-8")


def test_a_card_tells_data_licence_metrics_training_config_and_use(outputs: Path, capsys):
    path, text = card_of(outputs, "trial.1", capsys)
    assert path == outputs / "runs" / "trial.1" / "README.md"
    for fragment in (
        "Hang trial.1 (painter) on a wall, as 'a red \"circle\"'.",
        'license: "cc0-1.0"', "weights: no licence is stated",
        "10 train", "| painter | accuracy | 0.55 (0.45 to 0.65) |",
        '"weight": 0.1', "stage.painter.weight=0.1", "finished", "device-hours",
    ):  # fmt: skip
        assert fragment in text
    assert "![Samples: painter-samples](<pictures/painter-samples.png>)" in text
    assert (path.parent / "pictures" / "painter-samples.png").is_file()


def test_a_card_elsewhere_takes_its_pictures_along(outputs: Path, capsys, tmp_path: Path):
    path, text = card_of(outputs, "trial.1", capsys, "--output", str(tmp_path / "model.md"))
    assert path == tmp_path / "model.md"
    assert "(<model_pictures/painter-samples.png>)" in text
    assert (tmp_path / "model_pictures" / "painter-samples.png").is_file()


def test_a_failed_run_s_card_says_so_and_renders_no_foreign_html(outputs: Path, capsys):
    _, text = card_of(outputs, "broken", capsys)
    assert "failed, 1 of 3 stages done" in text
    assert "Nothing of this run can be used yet" in text
    assert small_world.HARM in text  # in the config's code block
    html = MarkdownIt("commonmark").render(text)
    assert "<script" not in html
    assert "free | &lt;script&gt;" in html


def test_what_a_run_was_started_from_is_told_and_makes_its_licence_another(tmp_path: Path, capsys):
    small_world.run(tmp_path, "borrowed", weight=0.1, note="from elsewhere")
    _, text = card_of(tmp_path, "borrowed", capsys)
    assert "- painter began as another's." in text
    assert 'license: "other"' in text


def test_a_run_without_data_yet_has_an_unknown_licence_and_no_use(tmp_path: Path, capsys):
    small_world.run(tmp_path, "begun", weight=0.1)
    shutil.rmtree(tmp_path / "artifacts")
    _, text = card_of(tmp_path, "begun", capsys)
    assert 'license: "unknown"' in text
    assert "No stage of this run has said yet what data" in text
