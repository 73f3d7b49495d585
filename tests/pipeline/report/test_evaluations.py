"""What `unclip evaluate` wrote, in a comparison."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.evaluations import evaluation_tables
from pipeline.report.page import page
from pipeline.report.table import table_json
from pipeline.report.terminal import print_comparison
from tests.support.small_world import HARM, compared

RUNS = ["trial.0", "trial.1"]


@pytest.fixture
def evaluated(outputs: Path, tmp_path: Path) -> Path:
    """Two runs measured on the same data, one of them twice, in another encoder too, and by a file that is damaged."""
    copy = Path(shutil.copytree(outputs, tmp_path / "outputs"))
    write(copy, "trial.0", "1", {"": {"fid": 30.0, "recall": 0.5}})
    write(copy, "trial.0", "2", {"": {"fid": 20.0, "fid_low": 19.0, "fid_high": 21.0}})
    write(copy, "trial.1", "3", {"": {"fid": 25.0}, "guidance=2": {"fid": None}}, plot="3.png")
    (copy / "runs" / "trial.1" / "evaluations" / "3.png").write_bytes(b"plot")
    write(copy, "trial.1", "4", {"": {"fid": 1.0}}, inception="another")
    (copy / "runs" / "trial.1" / "evaluations" / "5.json").write_bytes(b'{"data": \xff')
    return copy


def write(
    outputs: Path, run: str, name: str, points: dict[str, Any], inception: str = "0123456789", plot: str | None = None
) -> None:
    directory = outputs / "runs" / run / "evaluations"
    directory.mkdir(exist_ok=True)
    record = {
        "made_at": f"2026-01-0{name}", "data": [HARM], "settings": {"samples": 1000},
        "encoders": {"inception": inception}, "points": points, "plot": plot,
    }  # fmt: skip
    (directory / f"{name}.json").write_text(json.dumps(record))


def test_a_table_holds_what_was_measured_alike_and_the_latest_of_each_metric(evaluated: Path):
    same, other = evaluation_tables(evaluated, RUNS)
    assert same.conditions == f"{HARM}, 1,000 samples, inception 01234567"
    assert [(row.run, row.point, row.values.get("fid"), row.values.get("recall")) for row in same.rows] == [
        ("trial.0", "", 20.0, 0.5),
        ("trial.1", "", 25.0, None),
        ("trial.1", "guidance=2", None, None),
    ]
    assert same.metrics == ["fid", "recall"]
    assert [(row.run, row.values) for row in other.rows] == [("trial.1", {"fid": 1.0})]


def test_terminal_page_and_json_show_them(evaluated: Path):
    comparison = compared(evaluated, *RUNS)
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(console, comparison, [])
    assert "20 (19 to 21)" in console.export_text()
    html = page(comparison)
    assert "20 (19 to 21)" in html
    assert HARM not in html
    assert html.count("data:image/png;base64,cGxvdA==") == 1
    assert json.loads(table_json(comparison))["evaluations"][0]["rows"][0]["values"]["fid"] == 20.0


def test_a_narrow_terminal_says_what_it_leaves_out(evaluated: Path, capsys: pytest.CaptureFixture[str]):
    print_comparison(Console(width=45), compared(evaluated, *RUNS), [])
    assert "1 more metric: --json or --output" in capsys.readouterr().out
