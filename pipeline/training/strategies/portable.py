"""What all strategies share: checkpoints that any other strategy, on any number of processes, resumes from."""

import io
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from typing_extensions import override

from pipeline.errors import UserError
from pipeline.training.optimizer import AdamWithEma
from pipeline.training.ranks import gather_objects, rank_of_world
from pipeline.training.strategies.fragments import Fragment, named_tensors, read_fragments, trained_parameters
from pipeline.training.strategies.host_memory import HostMemory
from pipeline.training.strategies.launcher import StageLauncher
from pipeline.training.strategies.part import CheckpointPart

TRAINER_FILE = "trainer.pt"
CONSTANTS_FILE = "constants.safetensors"
DESCRIPTION_FILE = "description.json"


class PortableStrategy(Strategy):
    """A Lightning strategy whose checkpoints are directories of plain tensors.

    `fragments-R-of-N.*.safetensors` is what process R of N updates: weights, moments, averages. `constants.safetensors`
    holds buffers and frozen parameters, `trainer.pt` loops and schedules, `description.json` the shapes of all.
    They do not depend on the strategy, so any other one reads them as they are. Reading them executes no code.
    """

    def __init__(self, *args: Any, title: str, report: Callable[[str], object] = print, **options: Any) -> None:
        """`title` is the config's name for the strategy. `report` is told when one of the stage's processes dies."""
        super().__init__(*args, **options)
        self.title = title
        self._report = report
        self._host_memory = HostMemory()
        self._part: CheckpointPart | None = None

    @property
    def network(self) -> nn.Module:
        """The network that trains."""
        return cast(nn.Module, self.lightning_module.network)  # pyright: ignore[reportOptionalMemberAccess]

    @property
    @abstractmethod
    def adamw(self) -> AdamWithEma:
        """The optimiser itself."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """What this process updates of the network's parameters."""

    @abstractmethod
    def fragments_to_save(self) -> list[Fragment]:
        """What this process writes to a checkpoint. Every element is written by exactly one process."""

    @abstractmethod
    def averaged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights, parameter by parameter, float32 on this device. All processes iterate to the end."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient of a step, float []. It is not finite if the gradient is not."""

    def prepare_step(self, gradient_norm: Tensor, max_norm: float | None) -> None:
        """Have the next step clip the gradient to `max_norm`, and change nothing where its norm is not finite."""
        self.adamw.prepare_step(gradient_norm, max_norm)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each parameter that trains."""
        return {name: each.shape for name, each in trained_parameters(self.network).items()}

    def constant_shapes(self) -> dict[str, torch.Size]:
        """The shape of each buffer and frozen parameter."""
        trained = trained_parameters(self.network)
        return {name: each.shape for name, each in self.network.state_dict().items() if name not in trained}

    def constants(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters by name; all processes call this."""
        trained = trained_parameters(self.network)
        return {name: each.detach() for name, each in self.network.state_dict().items() if name not in trained}

    def set_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Put buffers and frozen parameters back."""
        own = self.network.state_dict(keep_vars=True)
        for name, tensor in constants.items():
            own[name].detach().copy_(tensor)

    def adopt_weights(self) -> None:
        """Copy the optimiser's weights to those that the network computes with, where the two are separate."""

    def leave_averaged_weights(self) -> None:
        """End training with the averaged weights in host memory, in the network of the first process alone.

        All processes call this, and do not need each other afterwards. Besides the averaged weights, one parameter at a
        time is held.
        """
        parameters = dict(self.network.named_parameters())
        constants = self.constants()
        for name, averaged in self.averaged_parameters():
            parameters[name].grad = None
            parameters[name].data = averaged.cpu() if self.is_global_zero else averaged.new_empty(0)
        for name, constant in constants.items():
            if name in parameters:
                parameters[name].data = constant.cpu()
        for buffer in self.network.buffers():
            buffer.data = buffer.cpu()
        self.adamw.state.clear()
        if isinstance(self.launcher, StageLauncher):
            self.launcher.end_watch()

    def _configure_launcher(self) -> None:
        if isinstance(self, DDPStrategy):
            assert self.cluster_environment is not None
            self._launcher = StageLauncher(self.cluster_environment, self.num_processes, self.num_nodes, self._report)

    @override
    def setup_environment(self) -> None:
        """Start the processes' communication, and check that all of them chose the same strategy."""
        super().setup_environment()
        self.require_agreement()

    def require_agreement(self) -> None:
        """Raise `UserError` if the processes of this stage chose different strategies."""
        titles = gather_objects(self.title)
        if len(set(titles)) > 1:
            raise UserError(
                f"the processes of this stage chose {', '.join(sorted(set(titles)))}, as their devices differ in "
                "memory; name one strategy for all, such as trainer=zero3"
            )

    @override
    def teardown(self) -> None:
        """Release what training held. Lightning's own would first copy the whole state to host memory."""
        self._host_memory.release()
        cluster_environment: ClusterEnvironment | None = getattr(self, "cluster_environment", None)
        if cluster_environment is not None:
            cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()

    # Lightning saves and restores no weights and no optimiser state: `save_checkpoint` and `load_checkpoint` do.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        pass

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Yes: `load_checkpoint` fills the optimiser, which exists only after the setup."""
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Take this process's part of the checkpoint, the directory `filepath`. All processes call this.

        Nothing is written: `take_part` gives what is to be, once the directory is there.
        """
        directory = Path(self.broadcast(str(filepath)))
        constants = self.constants()
        rank, world_size = rank_of_world()
        named = named_tensors(self.fragments_to_save(), self.adamw)
        tensors = [tensor for _, tensor in named]
        copies = self._host_memory.copies(tensors, getattr(self, "num_processes", 1))
        self._part = CheckpointPart(
            directory,
            self._common_files(checkpoint, constants) if self.is_global_zero else {},
            f"fragments-{rank:05}-of-{world_size:05}",
            [(name, tensor) for (name, _), tensor in zip(named, copies or tensors, strict=True)],
            is_copied=copies is not None,
        )

    def take_part(self) -> CheckpointPart:
        """This process's part of the checkpoint that was just saved, which is not kept here."""
        part, self._part = self._part, None
        assert part is not None
        return part

    def _common_files(self, checkpoint: dict[str, Any], constants: Mapping[str, Tensor]) -> dict[str, bytes]:
        kept = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        trainer = io.BytesIO()
        torch.save(kept, trainer)
        description = {"trained": self.shapes(), "constant": {name: each.shape for name, each in constants.items()}}
        return {
            TRAINER_FILE: trainer.getvalue(),
            CONSTANTS_FILE: save({name: tensor.cpu().contiguous() for name, tensor in constants.items()}),
            DESCRIPTION_FILE: json.dumps(description).encode(),
        }

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what this process holds, whichever process wrote it. All processes call this.

        Raises `UserError` for the checkpoint of another model.
        """
        directory = Path(checkpoint_path)
        self._require_same_network(directory)
        checkpoint = torch.load(directory / TRAINER_FILE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            read_fragments(sorted(directory.glob("fragments-*.safetensors")), self.fragments(), self.adamw)
            self.set_constants(load_file(directory / CONSTANTS_FILE))
            self.adopt_weights()
        (schedule,) = checkpoint["lr_schedulers"]
        for group, learning_rate in zip(self.adamw.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = learning_rate
        return {**checkpoint, "state_dict": {}, "optimizer_states": []}

    def _require_same_network(self, directory: Path) -> None:
        description = json.loads((directory / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        saved = {name: torch.Size(shape) for kind in description.values() for name, shape in kind.items()}
        own = self.shapes() | self.constant_shapes()
        if saved == own:
            return
        name = next(name for name in {**own, **saved} if saved.get(name) != own.get(name))
        raise UserError(
            f"{directory} is a checkpoint of another model: {name} has shape {_shown(saved.get(name))} there and "
            f"{_shown(own.get(name))} here; remove the checkpoint to train from the beginning"
        )


def _shown(shape: torch.Size | None) -> str:
    return "no" if shape is None else str(list(shape))


class _ReplicatedStrategy(PortableStrategy):
    """Every process holds all of the state."""

    def teardown(self) -> None:
        # Without what wraps it, and keeps buckets of gradients.
        self.model = self.lightning_module
        super().teardown()

    @property
    def adamw(self) -> AdamWithEma:
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, AdamWithEma)
        return optimizer

    def fragments(self) -> list[Fragment]:
        trained = trained_parameters(self.network)
        return [Fragment(name, 0, each.numel(), each, 0) for name, each in trained.items()]

    def fragments_to_save(self) -> list[Fragment]:
        rank, world_size = rank_of_world()
        return self.fragments()[rank::world_size]

    def averaged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        trained = trained_parameters(self.network)
        for fragment in self.fragments():
            yield fragment.name, fragment.averaged(self.adamw).view(trained[fragment.name].shape)

    def gradient_norm(self) -> Tensor:
        return get_total_norm([each.grad for each in self._trained if each.grad is not None])

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        # Once, and not at each step: it walks through all modules.
        return list(trained_parameters(self.network).values())


class PlainStrategy(_ReplicatedStrategy, SingleDeviceStrategy):
    """One process on one device."""


class ReplicatedStrategy(_ReplicatedStrategy, DDPStrategy):
    """Distributed data parallel: the state on every device, gradients averaged."""
