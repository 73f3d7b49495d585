"""Numbers of a config: what is taken, and what is refused because it would silently stand for another."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import (
    INTEGER_LIMIT,
    SEED_LIMIT,
    Fraction,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    RunConfig,
    Seed,
    Settings,
    validate,
)
from pipeline.errors import UserError
from stages.judge.settings import JudgeDataSettings
from stages.prepare.sources.scenes import ScenesSettings
from tests.support.fakes import run_config


class Numbers(Settings):
    seed: Seed = 0
    positive: Positive = 1
    not_negative: NotNegative = 0
    sizes: tuple[Positive, ...] = ()
    maybe: Positive | None = None
    fraction: Fraction = 0.0
    positive_float: PositiveFloat = 1.0
    not_negative_float: NotNegativeFloat = 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("seed", SEED_LIMIT - 1),
        ("positive", INTEGER_LIMIT - 1),
        ("not_negative", 0),
        ("sizes", [1, 2]),
        ("maybe", None),
        ("fraction", 1),
        ("positive_float", 3),
        ("not_negative_float", 0),
    ],
)
def test_numbers_up_to_their_limits_are_taken(key: str, value: Any):
    taken = getattr(validate(Numbers, {key: value}), key)
    assert taken == (tuple(value) if key == "sizes" else value)
    assert isinstance(taken, float) is key.endswith(("float", "fraction"))


WHOLE_KEYS = ("seed", "positive", "not_negative", "maybe")
FLOAT_KEYS = ("fraction", "positive_float", "not_negative_float")


@pytest.mark.parametrize("key", WHOLE_KEYS)
@pytest.mark.parametrize("value", [True, 1.5, 1.0, "1", "many", float("nan"), float("inf"), SEED_LIMIT, -1])
def test_what_is_no_whole_number_within_its_limits_is_refused_in_one_line(key: str, value: Any):
    with pytest.raises(UserError, match=f"^{re.escape(f'stage.x.{key}={value!r}: ')}[^\n]+; [^\n]+$"):
        validate(Numbers, {key: value}, "stage.x")


@pytest.mark.parametrize("key", FLOAT_KEYS)
@pytest.mark.parametrize("value", [True, "0.5", float("nan"), float("inf"), float("-inf"), -0.5])
def test_what_is_no_finite_number_is_refused_in_one_line(key: str, value: Any):
    with pytest.raises(UserError, match=f"^{re.escape(f'stage.x.{key}={value!r}: ')}[^\n]+; [^\n]+$"):
        validate(Numbers, {key: value}, "stage.x")


@pytest.mark.parametrize(("value", "remedy"), [(1e6, "write 1000000"), ("7", "write 7"), (1.5, "give a value")])
def test_a_whole_number_in_another_form_is_refused_with_the_form_to_write(value: Any, remedy: str):
    with pytest.raises(UserError, match=remedy):
        validate(Numbers, {"positive": value})


def test_a_truth_value_among_sizes_is_refused_by_its_place():
    with pytest.raises(UserError, match=r"sizes\.1=True"):
        validate(Numbers, {"sizes": [4, True]})


def test_a_count_beyond_64_bits_is_refused():
    with pytest.raises(UserError, match=f"less than {INTEGER_LIMIT}"):
        validate(Numbers, {"positive": INTEGER_LIMIT})


@pytest.mark.parametrize("schema", [RunConfig, ScenesSettings, JudgeDataSettings])
@pytest.mark.parametrize("seed", [SEED_LIMIT, -1, True, 1.0, "1"])
def test_every_seed_of_a_config_is_one_of_64_bits(schema: type[Settings], seed: Any):
    with pytest.raises(UserError, match=re.escape(f"seed={seed!r}: ")):
        validate(schema, {"seed": seed, **_others(schema)})
    assert validate(schema, {**_others(schema), "seed": SEED_LIMIT - 1}).model_dump()["seed"] == SEED_LIMIT - 1


def _others(schema: type[Settings]) -> dict[str, Any]:
    """Valid values of the settings beside a seed."""
    if schema is RunConfig:
        return {key: value for key, value in run_config(Path("out")).model_dump().items() if key != "seed"}
    drawn = {"samples": 1, "image_size": 64, "shard_samples": 1}
    if schema is JudgeDataSettings:
        return {**drawn, "validation_samples": 1}
    split = {"split_key": "key", "validation_fraction": 0.1}
    return {**drawn, **split, "source": "scenes", "unseen_samples": 0, "two_objects_share": 0.5}
