from typing import Any

from pipeline.report.differences import differing_overrides, differing_settings
from pipeline.workflow.runs import RunRecord


def record(name: str, overrides: list[str], config: dict[str, Any]) -> RunRecord:
    config = {"run": {"name": name}, **config}
    return RunRecord(name=name, group="g", overrides=overrides, config=config, stages=[], started_at="")


def test_a_string_and_the_number_that_it_looks_like_differ_and_look_different():
    records = [record(name, [], {"stage": {"a": {"x": value}}}) for name, value in (("one", "1"), ("two", 1))]
    assert differing_settings(records) == {"stage.a.x": ['"1"', "1"]}


def test_strings_are_bare_where_nothing_is_mistaken_for_them():
    records = [record(name, [], {"x": value}) for name, value in (("one", "a"), ("two", None), ("three", True))]
    assert differing_settings(records) == {"x": ["a", "null", "true"]}
    words = [record(name, [], {"x": value}) for name, value in (("one", "null"), ("two", None))]
    assert differing_settings(words) == {"x": ['"null"', "null"]}


def test_a_member_whose_line_leaves_a_setting_out_has_the_value_of_its_config():
    records = [
        record("m.0", ["stage.a.x=2"], {"seed": 0, "stage": {"a": {"x": 2.0}}}),
        record("m.1", ["seed=1"], {"seed": 1, "stage": {"a": {"x": 1.0}}}),
    ]
    assert differing_overrides(records) == {"stage.a.x": ["2.0", "1.0"], "seed": ["0", "1"]}


def test_a_parameter_is_one_however_it_was_added():
    overrides = ["stage.a.x=1", "+stage.a.x=2", "++stage.a.x=3"]
    records = [
        record(f"m.{number}", [override], {"stage": {"a": {"x": number + 1}}})
        for number, override in enumerate(overrides)
    ]
    assert differing_overrides(records) == {"stage.a.x": ["1", "2", "3"]}


def test_a_choice_of_a_group_is_shown_as_it_was_written():
    records = [
        record("m.0", ["data=emoji"], {"data": {"source": "emoji", "size": 1}}),
        record("m.1", [], {"data": {"source": "scenes", "size": 1}}),
    ]
    assert differing_overrides(records) == {"data": ["emoji", "—"]}
