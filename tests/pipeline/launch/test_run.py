"""Starting runs: what is refused before anything is written."""

from pathlib import Path

import pytest

from pipeline.config import RunSettings
from pipeline.errors import UserError
from pipeline.launch.run import start
from pipeline.terminal.display import Display
from pipeline.workflow.plan import plan_run
from tests.support.fakes import TRAINER, run_config


@pytest.mark.parametrize("objective", ["decodr.loss", "decoder", "decoder.", ".loss"])
def test_an_objective_of_no_stage_is_refused_before_anything_runs(tmp_path: Path, objective: str):
    config = run_config(tmp_path, run=RunSettings(name="trial", objective=objective))
    with pytest.raises(UserError, match=r"is not stage\.metric of this run; its stages are prepare, clip, decoder"):
        start([plan_run(config)], Display(), waits=True)
    assert list(tmp_path.iterdir()) == []


def test_several_nodes_are_refused_here_before_anything_is_written(tmp_path: Path):
    config = run_config(tmp_path, trainer=TRAINER.model_copy(update={"num_nodes": 2}))
    with pytest.raises(UserError, match=r"stage\.prepare has trainer\.num_nodes=2, .* unclip submit"):
        start([plan_run(config)], Display(), waits=True)
    assert list(tmp_path.iterdir()) == []
