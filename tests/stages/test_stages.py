"""Each stage on tiny data, through the engine's entry point."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.data.batch import ImageBatch
from pipeline.data.draws import SampleDraws
from pipeline.errors import UserError
from pipeline.training.module import StageModule
from pipeline.training.optimizer import build_optimizer
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.progress import Outcome
from stages.clip.network import ClipModel, ClipTokenizer, Towers, contrastive_loss
from stages.clip.settings import ClipSettings, require_same_clip
from stages.clip.sources import SET_SIZES
from stages.clip.train import ClipModule
from stages.decoder.network import load_decoder
from stages.decoder.train import DecoderModule
from stages.embed.embeddings import load_clip_embeddings, load_embeddings
from stages.embed.run import PARTS
from stages.prior.network import load_prior
from stages.upsampler.network import load_upsampler
from tests.support.tiny_runs import plan_stages, rows_of, run_and_stop, run_stage_of, run_until

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(outputs: Path) -> Artifact:
    return run_until(outputs, "clip")


@pytest.fixture(scope="module")
def wider_clip(outputs: Path) -> Artifact:
    return run_until(outputs, "clip", "stage.clip.network.embed_dim=24", "stage.clip.network.text_width=24")


def test_prepare_publishes_shards_with_splits_and_says_whose_pictures_they_are(outputs: Path):
    artifact = run_until(outputs, "prepare")
    samples = artifact.manifest.numbers["samples"]
    assert samples["train"] + samples["validation"] == 64
    assert samples["unseen"] == 4
    assert artifact.manifest.numbers["licence"]
    assert (artifact.path / "index.json").exists()


def test_clip_publishes_what_its_consumers_need_and_its_retrieval(clip: Artifact):
    assert clip.manifest.numbers == {"embed_dim": 16, "context_length": 16, "image_size": 32}
    assert {"R@1/all", "R@5/all", "R@10/all"} <= clip.manifest.metrics.keys()
    assert all(0 <= value <= 1 for name, value in clip.manifest.metrics.items() if name.startswith("R@"))
    model = ClipModel.load(clip.path)
    assert model.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_clip_trains_with_the_sigmoid_loss_too(outputs: Path):
    siglip = run_until(outputs, "clip", "stage.clip.loss=siglip")
    assert "network.logit_bias" in dict(ClipModel.load(siglip.path).named_parameters())


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_clip_in_pieces_learns_what_it_learns_from_whole_batches(outputs: Path, tmp_path: Path, loss: str):
    whole = run_until(outputs, "clip", f"stage.clip.loss={loss}")
    pieces = run_until(tmp_path, "clip", f"stage.clip.loss={loss}", "stage.clip.trainer.micro_batch_size=3")
    assert pieces.manifest.fingerprint == whole.manifest.fingerprint
    expected, found = (load_file(each.path / "clip.safetensors") for each in (whole, pieces))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    for before, after in zip(rows_of(whole), rows_of(pieces), strict=True):
        assert after["samples_seen"] == before["samples_seen"]
        if "train/loss" in before:
            assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["contrastive", "siglip"])
def test_the_gradient_of_a_batch_in_pieces_is_that_of_the_whole_batch(tmp_path: Path, loss: str):
    settings = plan_stages(tmp_path, f"stage.clip.loss={loss}")["clip"].read_settings()
    assert isinstance(settings, ClipSettings)
    torch.manual_seed(0)
    module = ClipModule(ClipModel(settings.network, settings.loss), settings)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    captions = ("red", "a big blue ring", "green cross at the top", "two", "a", "b c", "small yellow square", "d")
    tokens = module.network.tokenize(captions)
    batch = ImageBatch(images, captions, torch.arange(8), torch.arange(8), tokens=tokens)
    objective = contrastive_loss(settings.loss, 0, 1)
    gradients = []
    for micro_batch_size in (8, 3):
        module.micro_batch_size = micro_batch_size
        module.zero_grad()
        objective(*module._embed(batch.image, tokens), module.network.logit_scale, module.network.logit_bias).backward()
        gradients.append({name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None})
    whole, pieces = gradients
    assert whole.keys() == pieces.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("asked", "scale"), [("null", 1 / 0.07), ("40.0", 40.0)])
def test_a_new_clip_begins_with_the_asked_logit_scale(tmp_path: Path, asked: str, scale: float):
    settings = [f"stage.clip.initial_logit_scale={asked}", "stage.clip.optimizer.learning_rate=1e-9"]
    rows = rows_of(run_until(tmp_path, "clip", *settings))
    assert [row["train/logit_scale"] for row in rows if "train/logit_scale" in row] == pytest.approx([scale] * 2)


def test_clip_sees_the_asked_share_of_pictures_without_colours_in_training_alone(tmp_path: Path):
    settings = plan_stages(tmp_path, "stage.clip.gray_scale_share=0.25")["clip"].read_settings()
    assert isinstance(settings, ClipSettings)
    module = ClipModule(ClipModel(settings.network, settings.loss), settings)
    image = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    rows, tokens = torch.arange(400), torch.zeros(400, 16, dtype=torch.int64)
    batch = ImageBatch(image, ("a",) * 400, rows, rows * 7919, tokens=tokens)
    shown = module._in_gray(batch)
    is_gray = (shown != image).flatten(1).any(1)
    assert 0.2 < is_gray.float().mean() < 0.3
    luma = torch.from_numpy(np.stack([np.asarray(Image.fromarray(each.permute(1, 2, 0).numpy()).convert("L"))
                                      for each in image]))  # fmt: skip
    difference = (shown[is_gray].int() - luma[is_gray][:, None].int()).abs()
    assert difference.max() <= 1  # Pillow's and torchvision's weights differ in the fourth digit
    # Which ones depends on each sample alone.
    part = ImageBatch(image[100:200], ("a",) * 100, torch.arange(100), torch.arange(100, 200) * 7919)
    assert torch.equal(module._in_gray(part), shown[100:200])
    seen: list[torch.Tensor] = []
    module._embed = lambda image, tokens: seen.append(image) or (torch.rand(400, 16), torch.rand(400, 16))
    module.eval()
    module.losses(batch)
    assert torch.equal(seen[0], image)


def test_a_local_open_clip_checkpoint_replaces_the_training(outputs: Path, clip: Artifact, tmp_path: Path):
    checkpoint = tmp_path / "open_clip.safetensors"
    weights = {name: tensor + 0.25 for name, tensor in load_file(clip.path / "clip.safetensors").items()}
    save_file(weights, checkpoint)
    taken = run_until(outputs, "clip", f"stage.clip.checkpoint={checkpoint}", "stage.clip.max_samples=0")
    assert taken.manifest.samples_seen == 0
    published = load_file(taken.path / "clip.safetensors")
    assert all(torch.equal(published[name], tensor) for name, tensor in weights.items())


def test_training_starts_from_a_local_open_clip_checkpoint(outputs: Path, clip: Artifact, tmp_path: Path):
    checkpoint = tmp_path / "open_clip.pt"
    network = ClipModel.load(clip.path).network
    assert isinstance(network, CLIP)
    torch.save(network.state_dict(), checkpoint)
    slow = ["stage.clip.optimizer.learning_rate=1e-9", "stage.clip.optimizer.weight_decay=0"]
    continued = run_until(outputs, "clip", f"stage.clip.checkpoint={checkpoint}", *slow)
    assert continued.manifest.samples_seen == 16
    for name, tensor in load_file(continued.path / "clip.safetensors").items():
        torch.testing.assert_close(tensor, network.state_dict()[name], rtol=0, atol=1e-6)


def test_a_checkpoint_of_another_width_is_refused(outputs: Path, wider_clip: Artifact):
    checkpoint = f"stage.clip.checkpoint={wider_clip.path / 'clip.safetensors'}"
    with pytest.raises(UserError, match=r"does not fit: token_embedding\.weight has shape ") as error:
        plan_stages(outputs, checkpoint, "stage.clip.max_samples=0")
    assert str(error.value).endswith(SET_SIZES)


def test_embeddings_are_those_of_the_projections_not_normalised_with_the_training_split_s_statistics(outputs: Path):
    embeddings = load_embeddings(run_until(outputs, "embed").path)
    assert embeddings.image_embed.shape == embeddings.text_embed.shape == (68, 16)
    norms = embeddings.image_embed.norm(dim=1)
    assert not torch.allclose(norms, torch.ones_like(norms), atol=1e-3)
    splits = np.load(run_until(outputs, "prepare").path / "splits.npy", allow_pickle=False)
    training = embeddings.image_embed[torch.from_numpy(splits == 0)].double()
    torch.testing.assert_close(embeddings.whitening.mean.double().flatten(), training.mean(0), rtol=1e-4, atol=1e-5)
    std = embeddings.whitening.std.double().flatten()
    assert torch.allclose(std, training.std(0), rtol=0.03)


def test_embed_resumes_by_parts_to_the_same_numbers(outputs: Path, tmp_path: Path):
    in_parts = ["stage.embed.part_samples=16", "stage.embed.batch_size=8", "trainer.drop_checkpoints=false"]
    run_until(tmp_path, "clip")
    frozen = plan_stages(tmp_path, *in_parts)["embed"]
    parts = frozen.work / PARTS
    outcome = run_and_stop(frozen, when=lambda: len(list(parts.glob("part-*.safetensors"))) >= 2)
    assert outcome is Outcome.INTERRUPTED
    written = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.safetensors")}
    assert 2 <= len(written) < 5
    assert run_stage_of(frozen) is Outcome.FINISHED
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    at_once = load_file(run_until(outputs, "embed").path / "embeddings.safetensors")
    resumed = load_file(frozen.store.path("embed", frozen.fingerprint) / "embeddings.safetensors")
    for name, tensor in at_once.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_prior_publishes_its_health_and_loads_with_its_clip(outputs: Path, clip: Artifact):
    prior = run_until(outputs, "prior")
    assert prior.manifest.numbers["clip"] == clip.manifest.fingerprint
    assert {"cosine_to_image", "cosine_to_other_image", "cosine_to_caption", "loss"} <= prior.manifest.metrics.keys()
    load_prior(prior, clip)
    assert [row["samples_seen"] for row in rows_of(prior) if "train/loss" in row] == [8, 16]


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("clip", "prior", "upsampler", "judge")]


@pytest.mark.parametrize("stage", ["decoder", *SLOW])
def test_no_step_waits_for_tokens_or_noise_that_its_loader_can_make(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    for needed in plan_stages(outputs)[stage].inputs.values():
        for reference in needed:
            run_until(outputs, reference.stage)
    shutil.copytree(outputs / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns(stage))
    in_step, waited_for = threading.Event(), list[str]()
    train, draw, tokenize = StageModule.training_step, SampleDraws.normal, ClipTokenizer.__call__

    def noted_step(module: StageModule, batch: ImageBatch, batch_idx: int) -> dict[str, torch.Tensor]:
        in_step.set()
        try:
            return train(module, batch, batch_idx)
        finally:
            in_step.clear()

    def noted_draw(draws: SampleDraws, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        if in_step.is_set() and purpose not in draws._normals:
            waited_for.append(purpose)
        return draw(draws, purpose, shape)

    def noted_tokens(tokenizer: ClipTokenizer, captions: Sequence[str]) -> torch.Tensor:
        if in_step.is_set():
            waited_for.append("tokens")
        return tokenize(tokenizer, captions)

    monkeypatch.setattr(StageModule, "training_step", noted_step)
    monkeypatch.setattr(SampleDraws, "normal", noted_draw)
    monkeypatch.setattr(ClipTokenizer, "__call__", noted_tokens)
    run_until(tmp_path, stage)
    assert waited_for == []


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[Towers]:
    """Which towers the decoders had that were built from here on."""
    seen: list[Towers] = []
    fit_start = DecoderModule.on_fit_start

    def note_towers(module: DecoderModule) -> None:
        seen.append(module.clip.towers)
        fit_start(module)

    monkeypatch.setattr(DecoderModule, "on_fit_start", note_towers)
    return seen


def test_the_decoder_with_a_clip_loss_loads_the_image_tower_and_logs_both_terms_with_their_gradients(
    outputs: Path, clip: Artifact, towers: list[Towers]
):
    decoder = run_until(
        outputs, "decoder", "stage.decoder.clip_loss.weight=0.1", "stage.decoder.clip_loss.sample_share=1"
    )
    assert towers == [Towers.BOTH]
    rows = [row for row in rows_of(decoder) if "train/loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/diffusion"] + 0.1 * row["train/clip"], rel=1e-5)
        assert row["train/gradient_norm_diffusion"] > 0
        assert row["train/gradient_norm_clip"] > 0
    load_decoder(decoder, clip)
    with Image.open(decoder.path / "samples.png") as grid:
        assert grid.size[0] >= 4 * 2 * 16


def test_the_decoder_with_lambda_zero_loads_no_image_tower(outputs: Path, towers: list[Towers]):
    decoder = run_until(outputs, "decoder", "stage.decoder.clip_loss.weight=0")
    assert towers == [Towers.TEXT]
    rows = [row for row in rows_of(decoder) if "train/loss" in row]
    assert all("train/clip" not in row for row in rows)
    assert all(row["train/loss"] == row["train/diffusion"] for row in rows)


def test_a_decoder_that_is_evaluated_as_it_trains_logs_it_and_is_no_other_for_it(outputs: Path):
    def trained(*overrides: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        artifact = run_until(outputs, "decoder", "stage.decoder.optimizer.learning_rate=3e-4", *overrides)
        found = rows_of(artifact), load_file(artifact.path / "weights.safetensors")
        shutil.rmtree(artifact.path)
        shutil.rmtree(outputs / "work" / "decoder")
        return found

    (plain, weights), (rows, evaluated) = trained(), trained("trainer.evaluate_every_samples=8")
    assert not any(name.startswith("evaluation/") for row in plain for name in row)
    measured = [row for row in rows if "evaluation/frechet" in row]
    assert [row["samples_seen"] for row in measured] == [8, 16]
    for row in measured:
        assert row["evaluation/frechet"] > 0
        assert row["evaluation/sample_to_caption_low"] < row["evaluation/sample_to_caption"] < 1
        assert -1 < row["evaluation/sample_to_real"] < 1
    assert all(torch.equal(weights[name], evaluated[name]) for name in weights)


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler"])
def test_losses_by_timestep_do_not_depend_on_how_a_batch_is_cut(outputs: Path, stage: str):
    def binned(*overrides: str) -> list[dict[str, float]]:
        own = f"stage.{stage}.optimizer.learning_rate=2e-4"
        artifact = run_until(outputs, stage, own, "trainer.log_every_steps=2", *overrides)
        rows = rows_of(artifact)
        # How a batch is cut is no part of what a stage is: without this the second time would reuse the first one's.
        shutil.rmtree(artifact.path)
        shutil.rmtree(outputs / "work" / stage)
        return [{name: value for name, value in row.items() if "diffusion_t" in name} for row in rows]

    whole, in_pieces = binned(), binned("trainer.micro_batch_size=1")
    names = {name.rpartition("/")[2] for row in whole for name in row}
    assert names
    assert names <= {f"diffusion_t{number}" for number in range(4)}
    assert in_pieces == [pytest.approx(row, rel=1e-3) for row in whole]


@pytest.mark.parametrize(
    "overrides",
    [
        ["stage.decoder.objective.prediction_type=epsilon", "stage.decoder.schedule.kind=linear"],
        [
            "stage.decoder.objective.prediction_type=v_prediction",
            "stage.decoder.schedule.zero_terminal_snr=true",
            "stage.decoder.objective.min_snr_gamma=5",
            "stage.decoder.sampler.clip_guidance_scale=1",
        ],
    ],
    ids=["epsilon, linear", "v, zero terminal snr, min-SNR, CLIP guidance"],
)
def test_the_decoder_trains_and_samples_with_every_prediction_type(outputs: Path, overrides: list[str]):
    decoder = run_until(outputs, "decoder", *overrides)
    assert np.isfinite(list(decoder.manifest.metrics.values())).all()
    assert (decoder.path / "samples.png").exists()


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_the_upsampler_trains_on_crops_and_is_measured_beside_bicubic(outputs: Path, degradation: str):
    upsampler = run_until(outputs, "upsampler", f"stage.upsampler.degradation={degradation}")
    assert upsampler.manifest.numbers == {"low_size": 16, "high_size": 64}
    assert upsampler.manifest.metrics["psnr_bicubic_db"] > 10
    assert np.isfinite(upsampler.manifest.metrics["psnr_db"])
    load_upsampler(upsampler)


def test_an_upsampler_needs_the_pictures_alone(outputs: Path):
    assert list(plan_stages(outputs)["upsampler"].inputs) == ["data"]


def test_embeddings_of_another_width_are_refused(outputs: Path, clip: Artifact, wider_clip: Artifact):
    embeddings = run_until(outputs, "embed")
    with pytest.raises(UserError, match=r"embeddings of width 16 and .* gives 24; train stage embed on that CLIP"):
        load_clip_embeddings(embeddings, wider_clip)
    require_same_clip(embeddings, clip)


def test_a_network_of_another_clip_is_refused(outputs: Path):
    decoder = run_until(outputs, "decoder", "stage.decoder.clip_loss.weight=0")
    with pytest.raises(UserError, match=r"was made with the CLIP .*, not with .*; train stage decoder on that CLIP"):
        load_decoder(decoder, run_until(outputs, "clip", "stage.clip.loss=siglip"))


def test_clip_s_training_keeps_the_scale_on_the_similarities_below_one_hundred(outputs: Path):
    settings = plan_stages(outputs)["clip"].read_settings()
    assert isinstance(settings, ClipSettings)
    module = ClipModule(ClipModel(settings.network, settings.loss), settings)
    optimizer = build_optimizer(module.network, settings.optimizer, module.parameter_ranges, fused=True)
    scale = module.network.network.logit_scale
    with torch.no_grad():
        scale.fill_(9.0)
    scale.grad = -torch.ones_like(scale)
    optimizer.step()
    assert module.network.logit_scale.item() == pytest.approx(100.0)
