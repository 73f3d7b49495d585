"""Networks of artifacts are those that were trained, and nothing is drawn only to be replaced."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.mixing import named_seed
from pipeline.errors import UserError
from pipeline.workflow.artifacts import WEIGHTS_FILE
from stages.clip.network import ClipModel, Towers, load_clip
from stages.clip.settings import ClipSettings
from stages.decoder.network import build_decoder, load_decoder
from stages.decoder.settings import DecoderSettings
from stages.decoder.train import DecoderModule
from stages.judge.network import Judge, load_judge
from stages.judge.settings import JudgeSettings
from stages.prior.network import build_prior, load_prior
from stages.prior.settings import PriorSettings
from stages.upsampler.network import build_upsampler, load_upsampler
from stages.upsampler.settings import UpsamplerSettings
from stages.weights import give_weights, without_weights
from tests.support.tiny_runs import plan_stages, run_until

pytestmark = pytest.mark.usefixtures("one_thread")

LOADED = ("clip", "text tower", "prior", "decoder", "upsampler", "judge")


def built_and_loaded(outputs: Path, name: str) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """A network that is built as it is to be trained and then filled, and as it is loaded."""
    clip = run_until(outputs, "clip")
    towers = ClipSettings.model_validate(plan_stages(outputs)["clip"].settings)
    sizes = towers.network
    if name in ("clip", "text tower"):
        kept = Towers.BOTH if name == "clip" else Towers.TEXT

        def filled_clip() -> nn.Module:
            model = ClipModel(sizes, towers.loss, kept)
            model.network.load_state_dict(load_file(clip.path / "clip.safetensors"), strict=kept is Towers.BOTH)
            return model.eval()

        return filled_clip, lambda: load_clip(clip, kept)
    artifact = run_until(outputs, name)

    def build() -> nn.Module:
        match name:
            case "prior":
                network = artifact.settings(PriorSettings).network
                return build_prior(network, sizes.embed_dim, sizes.context_length)
            case "decoder":
                return build_decoder(artifact.settings(DecoderSettings), sizes.embed_dim)
            case "upsampler":
                settings = artifact.settings(UpsamplerSettings)
                return build_upsampler(settings.network, settings.high_size)
        return Judge(artifact.settings(JudgeSettings))

    def filled() -> nn.Module:
        network = build()
        network.load_state_dict(load_file(artifact.path / WEIGHTS_FILE))
        return network.eval()

    loaders: dict[str, Callable[[], nn.Module]] = {
        "prior": lambda: load_prior(artifact, clip),
        "decoder": lambda: load_decoder(artifact, clip),
        "upsampler": lambda: load_upsampler(artifact),
        "judge": lambda: load_judge(artifact),
    }
    return filled, loaders[name]


class Initialisations(TorchDispatchMode):
    """The elements that are drawn at random in tensors that have memory."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(made, Tensor) and not made.is_meta:
            self.drawn += made.numel()
        return made


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_network_is_the_one_that_was_built_and_filled(outputs: Path, name: str):
    filled, load = built_and_loaded(outputs, name)
    expected, loaded = filled(), load()
    assert [each for each, _ in loaded.named_modules()] == [each for each, _ in expected.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        own, wanted = dict(getattr(loaded, kind)()), dict(getattr(expected, kind)())
        assert own.keys() == wanted.keys()
        for each, tensor in wanted.items():
            assert torch.equal(own[each], tensor), each
            assert type(own[each]) is type(tensor)
            assert own[each].dtype is tensor.dtype
            assert own[each].requires_grad == tensor.requires_grad
            assert own[each].device == tensor.device
    assert loaded.training == expected.training


@pytest.mark.parametrize("name", LOADED)
def test_what_is_loaded_is_not_drawn_before_and_no_random_number_is_lost(outputs: Path, name: str):
    filled, load = built_and_loaded(outputs, name)
    with Initialisations() as when_built:
        filled()
    before = torch.get_rng_state()
    with Initialisations() as when_loaded:
        load()
    assert torch.equal(torch.get_rng_state(), before)
    assert when_built.drawn > 0
    # open_clip makes three small parameters of its image tower from tensors that it has drawn.
    assert when_loaded.drawn <= (when_built.drawn / 10 if name in ("clip", "text tower") else 0)


def test_loaded_weights_begin_where_torch_lets_its_own_begin(outputs: Path):
    _, load = built_and_loaded(outputs, "upsampler")
    assert {each.data_ptr() % 64 for each in load().parameters()} == {0}


def test_weights_of_another_type_become_those_of_the_network():
    network = without_weights(lambda: nn.Linear(3, 2))
    give_weights(network, {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).half()})
    assert network(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    assert network.weight.requires_grad


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
def test_weights_that_do_not_fit_are_refused_in_a_line(outputs: Path, tmp_path: Path, change: str):
    artifact = run_until(outputs, "judge")
    weights = load_file(artifact.path / WEIGHTS_FILE)
    match change:
        case "missing":
            del weights["heads.bias"]
        case "unexpected":
            weights["more.bias"] = torch.ones(1)
        case _:
            weights["heads.bias"] = torch.ones(1)
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(
        UserError, match=r"does not fit the network .*(heads|more).bias.*; train stage judge again"
    ) as said:
        load_judge(replace(artifact, path=tmp_path))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_a_decoder_s_first_weights_are_those_that_its_seed_has_always_given(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, weight: float
):
    first: dict[str, Tensor] = {}
    monkeypatch.setattr(
        DecoderModule,
        "on_fit_start",
        lambda module: first.update({name: each.detach().clone() for name, each in module.network.named_parameters()}),
    )
    run_until(outputs, "decoder", f"stage.decoder.clip_loss.weight={weight}", "stage.decoder.max_samples=8")
    planned = plan_stages(outputs, f"stage.decoder.clip_loss.weight={weight}")
    clip = ClipSettings.model_validate(planned["clip"].settings)
    torch.manual_seed(named_seed(planned["decoder"].seed, "decoder"))
    if weight > 0:
        ClipModel(clip.network, clip.loss)
    expected = build_decoder(DecoderSettings.model_validate(planned["decoder"].settings), clip.network.embed_dim)
    assert first
    assert all(torch.equal(first[name], each) for name, each in expected.named_parameters())
