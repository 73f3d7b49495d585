"""`trainer.compile` and `trainer.activation_checkpointing`: faster or smaller, and the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from pipeline.config import ActivationCheckpointing, Compile, StrategyName
from pipeline.errors import UserError
from pipeline.training.compiling import (
    STEPS_THAT_COMPILE,
    StopCompiling,
    blocks_of,
    checkpoint_activations,
    choose_compile,
    compiled,
)
from pipeline.workflow.progress import COMPILER_CACHE, Outcome, read_failure
from tests.support import ROOT, tiny
from tests.support.tiny import are_equal, finished, frozen, rows, run, weights

COUNT_COMPILATIONS = """
import json, sys
from pathlib import Path
from torch._dynamo.utils import counters
from tests.support import tiny
kind = tiny.Compile(sys.argv[3])
validation = dict(validation_samples=12, validate_every_samples=16)
stage = tiny.frozen(Path(sys.argv[1]), max_samples=int(sys.argv[2]), compile=kind, **validation)
tiny.SCRIPT.at_samples = int(sys.argv[4]) if len(sys.argv) > 4 else None
tiny.SCRIPT.happens = lambda context: context.interruption.set()
outcome = tiny.run(stage)
inductor = counters["inductor"]
print(json.dumps([outcome.value, counters["stats"]["unique_graphs"], len(counters["graph_break"]),
                  inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]]))
"""


def in_a_process_of_its_own(
    outputs: Path, samples: int, kind: Compile, stop_at: int | None = None
) -> tuple[str, int, int, int, int]:
    """Outcome, graphs, graph breaks, and hits and misses of the compiler's cache of a training."""
    arguments = [str(outputs), str(samples), kind.value, *([] if stop_at is None else [str(stop_at)])]
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCHINDUCTOR_CACHE_DIR",)}
    ended = subprocess.run(
        [sys.executable, "-c", COUNT_COMPILATIONS, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    outcome, graphs, breaks, hits, misses = json.loads(ended.stdout.splitlines()[-1])
    return outcome, graphs, breaks, hits, misses


@pytest.mark.slow
def test_a_compiled_training_is_the_eager_one_to_rounding_and_a_resume_compiles_nothing_anew(tmp_path: Path):
    first = in_a_process_of_its_own(tmp_path / "compiled", 80, Compile.NETWORK, stop_at=40)
    # The network that trains, and its two blocks as they validate, though each validation has a network of its own. One
    # block is compiled again for the last batch, which does not happen to have as many samples as a picture has rows.
    # One of these graphs is equal to another one, and found in the cache.
    assert first == (Outcome.INTERRUPTED.value, 4, 0, 1, first[4])
    assert first[4] > 0
    assert (tmp_path / "compiled" / COMPILER_CACHE).is_dir()
    second = in_a_process_of_its_own(tmp_path / "compiled", 80, Compile.NETWORK)
    assert second == (Outcome.FINISHED.value, 4, 0, second[3], 0)
    assert second[3] > 0
    eager = frozen(tmp_path / "eager", validation_samples=12, validate_every_samples=16)
    assert run(eager) is Outcome.FINISHED
    compiled = weights(frozen(tmp_path / "compiled"))
    for name, weight in weights(eager).items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-5)
    validated = [
        [row["validation/loss"] for row in rows(stage) if "validation/loss" in row]
        for stage in (eager, frozen(tmp_path / "compiled"))
    ]
    assert len(validated[0]) == 5
    assert validated[1] == pytest.approx(validated[0], rel=1e-4)


def test_after_the_first_steps_another_shape_is_computed_eagerly():
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    network = nn.Linear(4, 4)
    network.compile(backend=count)
    stop = StopCompiling()
    try:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            network(torch.ones(2, 4))
            network(torch.ones(3, 4))
            assert graphs == 2
            for _ in range(STEPS_THAT_COMPILE):
                stop.on_step(None, None)  # pyright: ignore[reportArgumentType]
            network(torch.ones(2, 4))
            expected = nn.functional.linear(torch.ones(5, 4), network.weight, network.bias)
            assert torch.equal(network(torch.ones(5, 4)), expected)
            assert graphs == 2
    finally:
        torch.compiler.set_stance("default")


def test_auto_compiles_where_it_pays_and_what_cannot_be_compiled_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch):
    def choose(kind: Compile, strategy: StrategyName = StrategyName.DDP, *, is_cuda: bool = True) -> Compile:
        return choose_compile(tiny.TRAINER.model_copy(update={"compile": kind}), strategy, is_cuda=is_cuda).kind

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert choose(Compile.AUTO) is Compile.NETWORK
    assert choose(Compile.AUTO, is_cuda=False) is Compile.NONE
    assert choose(Compile.AUTO, StrategyName.ZERO2) is Compile.NETWORK
    assert choose(Compile.AUTO, StrategyName.ZERO3) is Compile.NONE
    assert choose(Compile.BLOCKS, is_cuda=False) is Compile.BLOCKS
    with pytest.raises(UserError, match=r"trainer.compile=network: ZeRO-3 gathers .*; use trainer.compile=none"):
        choose(Compile.NETWORK, StrategyName.ZERO3)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert choose(Compile.AUTO) is Compile.NONE
    with pytest.raises(UserError, match="needs Triton"):
        choose(Compile.BLOCKS)


def test_without_a_compiler_a_stage_that_is_to_be_compiled_says_so(tmp_path: Path):
    stage = frozen(tmp_path, compile=Compile.NETWORK)
    with inductor.patch({"cpp.cxx": (str(tmp_path / "g++"),)}):
        assert run(stage) is Outcome.FAILED
    failure = read_failure(stage.work)
    assert failure is not None
    assert failure.is_user_error
    assert "trainer.compile=network: torch.compile needs a C++ compiler" in failure.message


class Block(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.GELU(), nn.Linear(32, 8))
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def test_blocks_are_found_wherever_they_are_and_not_inside_of_others():
    first, second = Block(), Block(inner=Block())
    network = nn.Sequential(nn.Linear(8, 8), first, nn.ModuleDict({"deep": nn.ModuleList([second])}))
    assert blocks_of(network, (Block,)) == [first, second]


@pytest.mark.slow
def test_the_gradient_of_a_loss_in_a_compiled_frozen_network_can_be_measured_before_the_backward_pass(tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Linear(8, 8)
    frozen_network = Block().eval().requires_grad_(False)
    module = SimpleNamespace(network=network, frozen_networks=(frozen_network,), block_classes=(Block,))
    prediction = network(torch.ones(4, 8))
    frozen_network(prediction).square().mean().backward()
    expected = network.weight.grad
    assert expected is not None
    network.weight.grad = None
    with compiled(module, Compile.BLOCKS, tmp_path / COMPILER_CACHE):  # pyright: ignore[reportArgumentType]
        prediction = network(torch.ones(4, 8))
        loss = frozen_network(prediction).square().mean()
        (measured,) = torch.autograd.grad(loss, prediction, retain_graph=True)
        loss.backward()
    assert measured.norm() > 0
    torch.testing.assert_close(network.weight.grad, expected)


def kept_bytes_and_gradients(network: nn.Module) -> tuple[int, list[torch.Tensor]]:
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(torch.ones(64, 8)).square().mean()
    loss.backward()
    return kept, [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_checkpointed_blocks_keep_less_and_give_the_same_gradients_with_dropout():
    plain, checkpointed = (nn.Sequential(*(Block() for _ in range(4))) for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    checkpoint_activations(checkpointed, (Block,))
    kept, gradients = kept_bytes_and_gradients(plain)
    kept_less, same_gradients = kept_bytes_and_gradients(checkpointed)
    assert kept_less < kept / 4
    assert all(map(torch.equal, gradients, same_gradients))
    assert list(checkpointed.state_dict()) == list(plain.state_dict())


def test_a_training_with_checkpointed_blocks_has_the_bits_of_one_without(tmp_path: Path):
    plain = frozen(tmp_path / "plain", dropout=0.3)
    assert run(plain) is Outcome.FINISHED
    less = frozen(tmp_path / "less", dropout=0.3, activation_checkpointing=ActivationCheckpointing.BLOCKS)
    assert run(less) is Outcome.FINISHED, read_failure(less.work)
    assert are_equal(weights(less), weights(plain))
    assert finished(less).manifest.metrics == finished(plain).manifest.metrics
