from pathlib import Path

import pytest

from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.runs import read_run, run_artifacts
from tests.support.fakes import publish
from tests.support.stores import Stages, finish, record


@pytest.fixture
def two(tmp_path: Path) -> tuple[Stages, Stages]:
    """Two finished runs that share all but the decoder and what follows from it."""
    first, second = record(tmp_path, "first"), record(tmp_path, "second", weight=0.9)
    finish([*first.values(), *second.values()])
    return first, second


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A store with a finished run `first`, and `second` that has another decoder."""
    for stage in (*record(tmp_path, "first").values(), record(tmp_path, "second", weight=0.2)["decoder"]):
        assert stage.frozen is not None
        write_frozen(stage.frozen)
        publish(stage)
    return tmp_path


@pytest.fixture
def clip(outputs: Path) -> Artifact:
    return run_artifacts(outputs, read_run(outputs, "first"))["clip"]
