"""The demo's networks, trained shortly by the real command, make what their captions say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

UNCLIP = str(Path(sys.executable).parent / "unclip")
SHORT = [
    "run.name=short",
    "tracking=none",
    "trainer.accelerator=cpu",
    "trainer.cpu_threads=1",  # two threads stall each other where something else wants a core
    "data.samples=6000",
    "data.unseen_samples=64",
    "stage.clip.max_samples=51200",
    "stage.prior.max_samples=12800",
    "stage.decoder.max_samples=16000",
    "~stage.upsampler",
    "~stage.judge_clip",
    "~stage.export",
    "stage.judge.max_samples=25600",
    "stage.judge.data.samples=3000",
    "stage.evaluate.samples=16",
    "stage.evaluate.judged_samples=64",
]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it trains for 6 minutes, and some machines are half as fast
def test_colours_and_backgrounds_are_right_after_a_short_training(tmp_path: Path):
    done = subprocess.run(
        [UNCLIP, "run", *SHORT, f"paths.outputs={tmp_path}"], capture_output=True, text=True, check=False, timeout=1700
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = tmp_path.glob("artifacts/evaluate/*/manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    # The judge itself is right, or its readings of samples mean nothing.
    assert metrics["seen/real_base/colour"] > 0.9
    # By chance: an eighth of the colours, a quarter of the backgrounds.
    assert metrics["seen/base/colour"] > 0.5
    assert metrics["seen/base/background"] > 0.8
