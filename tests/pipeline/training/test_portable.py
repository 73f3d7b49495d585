"""What every strategy does at a checkpoint and at the end of training."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pipeline.errors import UserError
from pipeline.training.optimizer import EMA, AdamWithEma, build_optimizer
from pipeline.training.strategies import host_memory, portable
from pipeline.training.strategies.fragments import Fragment, named_tensors, read_fragments, trained_parameters
from pipeline.training.strategies.part import write_tensors
from pipeline.training.strategies.portable import PlainStrategy
from pipeline.workflow.digests import file_sha256
from tests.support import tiny


def trained(network: nn.Module) -> AdamWithEma:
    """The optimiser of a network after a step."""
    optimizer = build_optimizer(network, tiny.OPTIMIZER, {}, fused=False)
    for parameter in trained_parameters(network).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def fragments(network: nn.Module) -> list[Fragment]:
    return [Fragment(name, 0, each.numel(), each, 0) for name, each in trained_parameters(network).items()]


def test_a_large_state_is_written_in_several_files_and_read_from_all(tmp_path: Path):
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = trained(network)
    named = named_tensors(fragments(network), optimizer)
    names = list(write_tensors(tmp_path, "fragments-00000-of-00001", named, Event(), file_bytes=1024))
    assert len(names) == 4, "each weight closes a file, and the last bias has one of its own"
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    restored = build_optimizer(other, tiny.OPTIMIZER, {}, fused=False)
    with torch.no_grad():
        read_fragments([tmp_path / name for name in names], fragments(other), restored)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for state in ("step", "exp_avg", "exp_avg_sq", EMA):
            assert torch.equal(optimizer.state[one][state], restored.state[two][state])


def test_a_process_that_holds_nothing_writes_a_file_that_says_so(tmp_path: Path):
    (name,) = write_tensors(tmp_path, "fragments-00003-of-00004", [], Event())
    with safe_open(tmp_path / name, framework="pt") as file:
        assert list(file.keys()) == []


def strategy_of(network: nn.Module) -> PlainStrategy:
    strategy = PlainStrategy(torch.device("cpu"), title="ddp")
    strategy._lightning_module = cast(Any, SimpleNamespace(network=network))
    strategy.optimizers = [trained(network)]
    return strategy


def files_of(strategy: PlainStrategy, directory: Path) -> dict[str, str]:
    """Names and digests of the files of a checkpoint."""
    directory.mkdir()
    strategy.save_checkpoint({"lr_schedulers": []}, directory)
    return strategy.take_part().write(Event())


def test_training_leaves_the_averages_and_lets_go_of_everything_else():
    network = nn.Linear(4, 4)
    strategy = strategy_of(network)
    averages = {name: average.clone() for name, average in strategy.averaged_parameters()}
    strategy.teardown()
    assert strategy.adamw.state, "the averages are needed after Lightning's teardown"
    strategy.leave_averaged_weights()
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, averages[name])
        assert parameter.grad is None
    assert not strategy.adamw.state


@pytest.mark.parametrize("kind", ["trained", "constant"])
def test_the_checkpoint_of_another_network_is_refused_whatever_of_it_differs(tmp_path: Path, kind: str):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False))
    strategy = strategy_of(network)
    files_of(strategy, tmp_path / "saved")
    width = 5 if kind == "trained" else 4
    other = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 2 if kind == "trained" else 3).requires_grad_(False))
    name, saved, own = ("0.weight", [4, 4], [4, 5]) if kind == "trained" else ("1.weight", [2, 4], [3, 4])
    with pytest.raises(UserError, match="is a checkpoint of another model") as error:
        strategy_of(other).load_checkpoint(tmp_path / "saved")
    assert f"{name} has shape {saved} there and {own} here" in str(error.value)


def test_a_checkpoint_names_its_files_with_their_digests(tmp_path: Path):
    files = files_of(strategy_of(nn.Linear(4, 4)), tmp_path / "saved")
    assert sorted(files) == sorted(path.name for path in (tmp_path / "saved").iterdir())
    for name, digest in files.items():
        assert digest == file_sha256(tmp_path / "saved" / name)


@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_what_was_taken_stays_as_it_was_where_there_is_memory_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free_bytes: int
):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: free_bytes)
    network = nn.Linear(4, 4)
    strategy = strategy_of(network)
    strategy.save_checkpoint({"lr_schedulers": []}, tmp_path)
    part = strategy.take_part()
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.zero_()
    taken = dict(part.tensors)["weight|weight|0"]
    assert part.is_copied is bool(free_bytes)
    assert torch.equal(taken, before.flatten()) is part.is_copied
    assert ("training waits while a checkpoint is written" in capsys.readouterr().out) is not part.is_copied


def test_the_memory_for_copies_is_the_same_from_one_checkpoint_to_the_next(tmp_path: Path):
    strategy = strategy_of(nn.Linear(4, 4))
    places = []
    for _ in range(2):
        strategy.save_checkpoint({"lr_schedulers": []}, tmp_path)
        places.append([tensor.data_ptr() for _, tensor in strategy.take_part().tensors])
    assert places[0] == places[1]


def test_the_memory_of_the_host_is_what_its_control_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    free = host_memory.available_bytes()
    assert free > 3_000
    for place, limit, used, droppable in host_memory._LIMITS:
        group = tmp_path / place
        group.mkdir(exist_ok=True)
        (group / limit).write_text("5000\n")
        (group / used).write_text("3000\n")
        (group / "memory.stat").write_text(f"anon 2000\n{droppable} 1000\n")
    assert host_memory.available_bytes() == 3_000


def test_processes_that_chose_different_strategies_say_so(monkeypatch: pytest.MonkeyPatch):
    strategy = PlainStrategy(torch.device("cpu"), title="zero2")
    strategy.require_agreement()
    monkeypatch.setattr(portable, "gather_objects", lambda own: [own, "zero3"])
    with pytest.raises(UserError, match="chose zero2, zero3, as their devices differ in memory; name one strategy"):
        strategy.require_agreement()
