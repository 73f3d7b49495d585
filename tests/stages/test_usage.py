import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.workflow.artifacts import Artifact, Manifest
from stages.clip import settings as clip
from stages.decoder import settings as decoder
from stages.export import settings as export


def artifact(path: Path, numbers: dict[str, Any], config: dict[str, Any]) -> Artifact:
    manifest = Manifest(
        schema_version=1, stage="it", kind="it", fingerprint="f", identity={}, inputs={}, config=config,
        code_version="1", made_by_run="r", finished_at="", duration_s=0, samples_seen=0, numbers=numbers, metrics={},
        files=[],
    )  # fmt: skip
    return Artifact(path, manifest)


def test_stock_use_asks_for_the_run_s_own_guidance_and_caption(tmp_path: Path):
    (tmp_path / "configs").mkdir()
    for stage, kind, scale in (("mine", "prior", 1.5), ("decoder", "decoder", 0.0)):
        content = {"kind": kind, "fingerprint": "f", "settings": {"sampler": {"guidance_scale": scale}}}
        (tmp_path / "configs" / f"{stage}.json").write_text(json.dumps(content))
    said = export.usage("run", artifact(tmp_path, {"stock_pipeline": True}, {}), 'it\'s "red"')
    snippet = [line.strip() for line in said.splitlines() if "images[0]" in line]
    caption = repr('it\'s "red"')
    assert snippet == [f"pipeline({caption}, prior_guidance_scale=1.5, decoder_guidance_scale=0).images[0]"]


def test_the_command_of_a_caption_is_one_word_to_a_shell(tmp_path: Path):
    assert "unclip sample run 'a $(ring)' --count 4" in decoder.usage("run", artifact(tmp_path, {}, {}), "a $(ring)")


@pytest.mark.parametrize(("checkpoint", "said"), [(None, False), ("ViT-B-32.safetensors", True)])
def test_a_clip_that_was_started_from_a_checkpoint_says_so(tmp_path: Path, checkpoint: str | None, said: bool):
    numbers = {"embed_dim": 4, "context_length": 4, "image_size": 8, "checkpoint": checkpoint}
    origin = clip.origin(artifact(tmp_path, numbers, {}))
    assert ("the checkpoint `ViT-B-32.safetensors`" in origin) is said
    assert "/models" not in origin
