"""A CLIP that others trained does for a whole workflow, which trains none; what is exported comes back as it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.export.settings import ExportNumbers
from tests.stages.clip.test_sources import CONFIGS, write_local_dir
from tests.support.tiny_runs import TINY, run_until

WITHOUT_CLIP = [each for each in TINY if not each.startswith("stage.clip.")]
GUIDED = ["stage.decoder.clip_loss.weight=0.1", "stage.decoder.sampler.clip_guidance_scale=1.0"]
NETWORKS = ("prior", "decoder", "upsampler")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_stock"), [("quick_gelu", True), ("resnet", False), ("narrow text", False)])
def test_a_model_of_open_clip_does_for_a_whole_workflow(name: str, is_stock: bool, tmp_path: Path):
    write_local_dir(tmp_path / "theirs", CONFIGS[name])
    clip = [f"stage.clip.checkpoint={tmp_path / 'theirs'}", "stage.clip.max_samples=0", *GUIDED]
    run_until(tmp_path, "evaluate", *clip, base=WITHOUT_CLIP)
    exported = run_until(tmp_path, "export", *clip, base=WITHOUT_CLIP)
    assert exported.numbers(ExportNumbers).stock_pipeline is is_stock


@pytest.mark.slow
def test_an_export_comes_back_as_the_networks_that_it_was(tmp_path: Path):
    exported = run_until(tmp_path, "export", "run.name=base").path
    taken = [
        item
        for name in ("clip", *NETWORKS)
        for item in (f"stage.{name}.initial=diffusers:{exported}", f"stage.{name}.max_samples=0")
    ]
    sizes = [each for each in TINY if ".network" not in each and "image_size" not in each]
    again = run_until(tmp_path, "export", "run.name=again", "seed=3", *taken, base=sizes).path
    files = sorted(each.relative_to(exported) for each in exported.rglob("*.safetensors"))
    assert len(files) >= len(NETWORKS)
    for file in files:
        one, other = load_file(exported / file), load_file(again / file)
        assert one.keys() == other.keys(), file
        assert all(torch.equal(one[key], other[key]) for key in one), file
