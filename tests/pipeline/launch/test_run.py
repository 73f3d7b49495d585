"""A run as a function of its config."""

from pathlib import Path

import pytest

from pipeline.config import RunSettings
from pipeline.errors import UserError
from pipeline.launch.run import run_and_measure
from tests.support.fakes import run_config


@pytest.mark.parametrize("objective", ["decodr.loss", "decoder", "decoder.", ".loss"])
def test_an_objective_of_no_stage_is_refused_before_anything_runs(tmp_path: Path, objective: str):
    config = run_config(tmp_path, run=RunSettings(name="trial", objective=objective))
    with pytest.raises(UserError, match=r"is not stage\.metric of this run; its stages are prepare, clip, decoder"):
        run_and_measure(config, ())
    assert list(tmp_path.iterdir()) == []
