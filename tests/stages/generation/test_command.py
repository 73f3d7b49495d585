"""What `unclip sample`, `edit`, `evaluate` and `export` refuse of a run, and how soon."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.compose import compose_members
from pipeline.workflow.plan import plan_run
from pipeline.workflow.runs import record_run
from stages.generation.picture import Operation, Picture, Recipe
from tests.support.tiny_runs import TINY

REFUSES = "import sys; from pipeline.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Those of a run `begun` of which nothing is finished."""
    (member,) = compose_members("unclip plan", [*TINY, "run.name=begun", f"paths.outputs={tmp_path}"])
    record_run(plan_run(member.config, member.overrides))
    return tmp_path


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """A picture that says to be of that run, made by another decoder; beside it one that names no caption."""
    for name, captions in (("made.png", ("a red ring",)), ("mute.png", ())):
        recipe = Recipe(
            operation=Operation.TEXT_TO_IMAGE, run="begun", artifacts={"decoder": "0" * 64}, version="", seed=0,
            captions=captions,
        )  # fmt: skip
        Picture(Image.new("RGB", (8, 8)), recipe).save(tmp_path / name)
    return tmp_path / "made.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "begun", "a red ring"], "run begun lacks clip, .*decoder, upsampler; finish it"),
        (["sample", "--from", "made.png"], "made by decoder 000000000000 of run begun, which .* does not hold"),
        (["sample", "--from", "mute.png"], "is of 1 captions and 0 pictures, not of 0 and 0"),
        (["sample", "begun", "a red ring", "--batch-size", "0"], "--batch-size 0"),
        (["sample", "begun", "a red ring", "--picture", "made.png"], "--picture"),
        (["sample", "begun", "a <END_OF_TEXT> b"], "'<end_of_text>', which CLIP takes for its own mark"),
        (["sample", "begun", "a ring", "--negative", "&lt;start_of_text&gt;"], "CLIP takes for its own mark"),
        (["edit", "inpaint", "begun", "made.png", "made.png", "\udcff"], "is no valid text"),
        (["sample", "--from", "made.png", "--count", "3"], "leave out --count"),
        (["edit", "variations", "begun", "made.png"], "run begun lacks clip"),
        (["evaluate", "begun"], "run begun lacks clip"),
        (["export", "begun", "exported", "--format", "diffusers"], "run begun lacks clip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_run_cannot_do_is_refused_in_a_line_before_torch_is_imported(
    outputs: Path, png: Path, arguments: list[str], said: str
):
    done = subprocess.run(
        [sys.executable, "-c", REFUSES, *arguments, "--outputs", str(outputs)],
        cwd=png.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "2 False\n", done.stderr
    assert re.fullmatch(f"unclip: .*{said}.*\n", done.stderr), done.stderr
    assert not (png.parent / "exported").exists()
