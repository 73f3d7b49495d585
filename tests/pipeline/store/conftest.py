from pathlib import Path

import pytest

from tests.support.stores import Stages, finish, record


@pytest.fixture
def two(tmp_path: Path) -> tuple[Stages, Stages]:
    """Two finished runs that share all but the decoder and what follows from it."""
    first, second = record(tmp_path, "first"), record(tmp_path, "second", weight=0.9)
    finish([*first.values(), *second.values()])
    return first, second
