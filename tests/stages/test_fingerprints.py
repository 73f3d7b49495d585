"""What was made before stays valid: the fingerprints of every stage, as they were when they were written down.

A stage whose results become others gets a higher version, and new lines in `fingerprints.json`, with the reason in the
commit's message.
"""

import json
from pathlib import Path

import pytest

from tests.support.tiny_runs import plan_stages

RECORDED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("fingerprints.json").read_text())


@pytest.mark.parametrize("config", RECORDED, ids=lambda config: config or "the demo")
def test_fingerprints_are_those_that_finished_runs_have(config: str, tmp_path: Path):
    planned = plan_stages(tmp_path, base=[config] if config else [])
    assert {name: stage.fingerprint for name, stage in planned.items()} == RECORDED[config]
