"""The demo's networks, trained shortly by the real command, make what their captions say and what a picture shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import evaluation_loader
from pipeline.data.splits import Split
from stages import load
from stages.generation import editing
from stages.generation.options import GenerationOptions

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


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # it trains for 6 minutes, and some machines are half as fast
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("learning")
    done = subprocess.run(
        [UNCLIP, "run", *SHORT, f"paths.outputs={outputs}"], capture_output=True, text=True, check=False, timeout=1700
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs


def test_colours_and_backgrounds_are_right_after_a_short_training(trained: Path):
    (manifest,) = trained.glob("artifacts/evaluate/*/manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    # The judge itself is right, or its readings of samples mean nothing.
    assert metrics["seen/real_base/colour"] > 0.9
    # By chance: an eighth of the colours, a quarter of the backgrounds.
    assert metrics["seen/base/colour"] > 0.5
    assert metrics["seen/base/background"] > 0.8


def test_a_held_out_picture_comes_back_from_its_embedding_and_its_noise(trained: Path):
    chain = load("short", outputs=trained, shows_progress=False).chain
    (manifest,) = trained.glob("artifacts/prepare/*/manifest.json")
    size = chain.decoder.settings.image_size
    images = CaptionedImages(manifest.parent, chain.clip.settings.image_size, 0)
    batch = next(iter(evaluation_loader(images, split=Split.VALIDATION, batch_size=8, limit=8)))
    options, seeds = GenerationOptions().with_decoder_eta(0.0), list(range(8))
    latents = editing.encode(chain, batch.image_signed(), options)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.x_T.shape, generator=generator)

    def error(image_embed: torch.Tensor, start: torch.Tensor) -> float:
        """The root of the mean square of the difference, in units of half of the range of the pixels."""
        made = editing.decode(chain, editing.Latents(image_embed, start), seeds, options).base
        return (made - editing.resize(batch.image_signed(), size)).square().mean().sqrt().item()

    errors = {
        "its own": error(latents.image_embed, latents.x_T),
        "other noise": error(latents.image_embed, noise),
        "another's embedding": error(latents.image_embed.roll(1, 0), noise),
    }
    assert errors["its own"] < 0.1, errors
    assert errors["its own"] < 0.6 * errors["other noise"] < 0.6 * errors["another's embedding"], errors
