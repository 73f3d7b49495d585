import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.forecast.estimate import Forecast, StageForecast
from pipeline.forecast.rates import Target
from pipeline.forecast.table import UNKNOWN, forecast_lines
from pipeline.terminal.tables import new_console
from pipeline.workflow.plan import Action

TO_DO = StageForecast("decoder", "decoder", Action.RUN, samples=58_016, samples_per_s=1234.5, duration_s=47.0)
FINISHED = StageForecast("clip", "clip", Action.REUSE, notes=("finished in 9 s",))


def shown(width: int, *stages: StageForecast, price_per_hour: float | None = None) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width)
    target = Target("a device", False, True, 2**30, price_per_hour)
    for line in forecast_lines("trial", Forecast(target, stages, Path("outputs"), 10**12)):
        console.print(line, soft_wrap=isinstance(line, str))
    return text.getvalue()


def test_what_is_finished_has_a_note_and_no_row_and_what_is_unknown_a_question_mark():
    text = shown(160, FINISHED, TO_DO)
    (row,) = (line for line in text.splitlines() if "58,016" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "decoder", "58,016", UNKNOWN, UNKNOWN, "1,234", "47 s", UNKNOWN, UNKNOWN, UNKNOWN
    ]  # fmt: skip
    assert "clip: finished in 9 s" in text
    assert "forecast of run trial" not in shown(160, FINISHED)


@pytest.mark.parametrize(("price_per_hour", "has_cost"), [(None, False), (3.6, True)])
def test_there_is_a_column_of_costs_where_a_price_is_known(price_per_hour: float | None, has_cost: bool):
    text = shown(160, TO_DO, price_per_hour=price_per_hour)
    assert ("┃ cost" in text) is has_cost
    assert ("0.05" in text) is has_cost


def test_nothing_of_it_is_cut_where_the_terminal_is_narrow():
    rows = [line.split("│")[1:-1] for line in shown(60, TO_DO).splitlines() if line.startswith("│")]
    assert ["".join(part.strip() for part in column) for column in zip(*rows, strict=True)][:2] == ["decoder", "58,016"]


def test_a_table_in_a_pipe_is_as_wide_as_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert new_console().width == 160
    monkeypatch.setenv("COLUMNS", "72")
    assert new_console().width == 72
