import json
import subprocess
import sys
from hashlib import sha256

import pytest

from pipeline.workflow.fingerprint import canonical_json, counted_settings, differences, fingerprint
from tests.support.fakes import DecoderSettings, LossSettings

DECODER = DecoderSettings(channels=(1, 2), loss=LossSettings(weight=0.1))


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": {"d": 2, "c": [3]}}) == canonical_json({"a": {"c": [3], "d": 2}, "b": 1})
    assert json.loads(canonical_json({"ä": 0.1})) == {"ä": 0.1}


def test_canonical_json_refuses_what_is_not_equal_to_itself():
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"loss": float("nan")})


def test_a_fingerprint_is_the_sha256_of_identity_and_inputs():
    expected = sha256(b'{"identity":{"stage":"clip"},"inputs":{"data":["00"]}}').hexdigest()
    assert fingerprint({"stage": "clip"}, {"data": ["00"]}) == expected


def test_a_fingerprint_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from pipeline.workflow.fingerprint import fingerprint;"
        "print(fingerprint({'b': {'y': 1, 'x': 2}, 'a': 'ü'}, {'in': ['1', '2']}))"
    )
    outcomes = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outcomes == {fingerprint({"a": "ü", "b": {"x": 2, "y": 1}}, {"in": ["1", "2"]})}


def test_a_fingerprint_changes_with_any_input_and_with_their_order():
    made = [
        fingerprint({}, inputs)
        for inputs in ({}, {"a": []}, {"a": ["1"]}, {"b": ["1"]}, {"a": ["1", "2"]}, {"a": ["2", "1"]})
    ]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    "change",
    [{"channels": (2, 1)}, {"loss": LossSettings(weight=0.2)}, {"note": "x"}],
    ids=["list", "nested", "none to a value"],
)
def test_every_counted_setting_counts(change: dict):
    assert counted_settings(DECODER.model_copy(update=change)) != counted_settings(DECODER)


def test_a_runtime_setting_does_not_count_even_when_nested():
    nested = DECODER.model_copy(update={"loss": LossSettings(weight=0.1, shown_as="table")})
    assert counted_settings(nested) == counted_settings(DECODER)
    assert counted_settings(DECODER) == {"channels": [1, 2], "loss": {"weight": 0.1}, "note": None}


def test_differences_name_every_leaf_that_differs_by_its_dotted_key():
    before = {"a": {"x": 1, "y": 2}, "b": [1], "gone": 3}
    after = {"a": {"x": 1, "y": 5}, "b": [1, 2], "new": 4}
    found = list(differences(before, after))
    assert found == [("a.y", 2, 5), ("b", [1], [1, 2]), ("gone", 3, None), ("new", None, 4)]
    assert list(differences(before, before)) == []
