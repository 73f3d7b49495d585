"""The one door to DeepSpeed: a Lightning strategy that shards optimiser, gradients and weights (ZeRO, 1910.02054)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from pytorch_lightning import LightningModule
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pipeline.config import DeepSpeedSettings, Offload, Precision
from pipeline.training.optimizer import AdamWithEma
from pipeline.training.strategies.fragments import Fragment, gathered
from pipeline.training.strategies.portable import PortableStrategy

_MIB = 2**20
_FLOAT32_BYTES = 4


class ZeroStrategy(PortableStrategy, DeepSpeedStrategy):
    """DeepSpeed's ZeRO. It computes what DDP computes, in float32 or by autocast, with the state in shards.

    DeepSpeed's own bf16 is not used: it keeps float32 weights in the optimiser alone, and rounds where DDP does not.
    Its autocast is not used either: it caches cast weights, under ZeRO-3 whole ones.
    """

    def __init__(
        self,
        *,
        stage: int,
        offload: Offload,
        settings: DeepSpeedSettings,
        precision: Precision,
        collective_timeout_s: float,
        on_cuda: bool,
        title: str,
        report: Callable[[str], object] = print,
    ) -> None:
        super().__init__(
            config=_deepspeed_config(stage, offload, settings, on_cuda),
            precision_plugin=ZeroPrecision(precision, "cuda" if on_cuda else "cpu"),
            timeout=timedelta(seconds=collective_timeout_s),
            title=title,
            report=report,
        )
        self._stage = stage
        self.has_whole_weights = stage < 3
        self._linear = nn.functional.linear

    @override
    def setup_environment(self) -> None:
        """Start the processes' communication. On CPUs Lightning's DDP does it: its DeepSpeed strategy refuses them."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        # Or DeepSpeed builds an operator for shared memory, for a minute, that training does not use.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - a plain name would be mangled
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", number) for number in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)
        self.require_agreement()

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        # DeepSpeed reduces over a copy of the process group, to which it would give torch's own time-out.
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=self._timeout)

    @override
    def setup(self, trainer: Any) -> None:
        """Note the shapes of the parameters, then let DeepSpeed cut the network into shards."""
        self._shapes = super().shapes()
        self._constant_shapes = super().constant_shapes()
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        """Give torch its own linear function back: ZeRO-3 replaces it by one that rounds differently."""
        nn.functional.linear = self._linear
        super().teardown()

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each whole parameter that trains. Under ZeRO-3 this process holds only a part of it."""
        return self._shapes

    def constant_shapes(self) -> dict[str, torch.Size]:
        """The shape of each whole buffer and frozen parameter. Under ZeRO-3 this process holds only a part of it."""
        return self._constant_shapes

    @property
    def adamw(self) -> AdamWithEma:
        """The optimiser that DeepSpeed's own optimiser wraps."""
        optimizer = self._zero.optimizer
        assert isinstance(optimizer, AdamWithEma)
        return optimizer

    @property
    def _zero(self) -> DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3:
        (optimizer,) = self.optimizers
        return cast("DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3", optimizer)

    def fragments(self) -> list[Fragment]:
        """What this process updates: the consecutive elements of each parameter that are in its partition."""
        named = {name: dict(self.network.named_parameters())[name] for name in self._shapes}
        find = self._fragment_of_stage_3 if self._stage == 3 else self._fragment_of_stages_1_and_2
        found = [find(name, parameter) for name, parameter in named.items()]
        return [fragment for fragment in found if fragment is not None]

    def _fragment_of_stages_1_and_2(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return None
        in_parameter, in_partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        partitions = cast(DeepSpeedZeroOptimizer, self._zero).single_partition_of_fp32_groups
        holder = partitions[mapping.param_group_index]
        return Fragment(name, in_parameter.start, in_parameter.numel, holder, in_partition.start)

    def _fragment_of_stage_3(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        zero = cast(DeepSpeedZeroOptimizer_Stage3, self._zero)
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        start = self.global_rank * numel
        # The last processes' parts are padded to the length of the others'.
        own = min(numel, self._shapes[name].numel() - start)
        return Fragment(name, start, own, zero.fp32_partitioned_groups_flat[group], offset) if own > 0 else None

    def fragments_to_save(self) -> list[Fragment]:
        """All fragments of this process: no other process holds them."""
        return self.fragments()

    def averaged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights, gathered parameter by parameter."""
        parts = ((each.name, each.start, each.averaged(self.adamw)) for each in self.fragments())
        return gathered(self._shapes, parts, self.root_device)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, float []; infinite where it is not finite."""
        zero = self._zero
        is_stage_3 = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
        norm = combine_grad_norm_groups(zero._get_norm_groups()) if is_stage_3 else zero.scaled_global_norm()
        # Of an optimiser in host memory it is there too, and NCCL reduces nothing that is.
        return norm.to(self.root_device)

    @override
    def prepare_step(self, gradient_norm: Tensor, max_norm: float | None) -> None:
        """Leave the clipping to the engine, which does it in its step."""
        super().prepare_step(gradient_norm, None)

    def adopt_weights(self) -> None:
        """Copy the optimiser's weights to those that the network computes with."""
        zero = self._zero
        if isinstance(zero, DeepSpeedZeroOptimizer):
            zero.update_lp_params()
            return
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def constants(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters by name; all processes call this."""
        with self._gathered_frozen(modifier_rank=None):
            return {name: tensor.clone() for name, tensor in super().constants().items()}

    def set_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Put buffers and frozen parameters back."""
        with self._gathered_frozen(modifier_rank=0):
            super().set_constants(constants)

    @contextmanager
    def _gathered_frozen(self, modifier_rank: int | None) -> Iterator[None]:
        frozen = [each for each in self.network.parameters() if not each.requires_grad]
        is_sharded = self._stage == 3 and frozen
        with deepspeed.zero.GatheredParameters(frozen, modifier_rank=modifier_rank, enabled=bool(is_sharded)):
            yield

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass. Lightning has divided the loss by the accumulation; the engine must not again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


class ZeroPrecision(DeepSpeedPrecision):
    """Float32 weights, and autocast just as under DDP. Callbacks see each step once, at its end."""

    def __init__(self, precision: Precision, device_type: str) -> None:
        super().__init__("32-true")
        self._autocasts = precision is Precision.BFLOAT16_MIXED
        self._device_type = device_type

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast without its cache, which would add up in bf16 the gradients of a weight that is used often."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocasts, cache_enabled=False):
            yield

    @contextmanager
    @override
    def train_step_context(self) -> Iterator[None]:
        """Start no autocast here: the engine would end it. The module starts it, in `forward_context`."""
        yield

    @override
    def convert_input(self, data: Any) -> Any:
        """Leave batches as they are: their types are right already."""
        return data

    @override
    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Any, **kwargs: Any) -> Any:
        """Run one micro-batch. The engine counts them, and steps after the last one of a batch."""
        closure()
        engine = cast(deepspeed.DeepSpeedEngine, model.trainer.model)
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
        return engine.step()


def _deepspeed_config(stage: int, offload: Offload, settings: DeepSpeedSettings, on_cuda: bool) -> dict[str, Any]:
    bucket = int(settings.bucket_mib * _MIB / _FLOAT32_BYTES)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": settings.overlap_communication and on_cuda,
        "reduce_scatter": on_cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "sub_group_size": int(settings.sub_group_mib * _MIB / _FLOAT32_BYTES),
        "memory_efficient_linear": on_cuda,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": settings.gathered_below_elements,
        "stage3_max_live_parameters": int(settings.max_gathered_mib * _MIB / _FLOAT32_BYTES),
    }
    on_host = {"device": "cpu", "pin_memory": on_cuda}
    if offload is not Offload.NONE:
        zero["offload_optimizer"] = on_host
    if offload is Offload.PARAMETERS:
        zero["offload_param"] = on_host
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own throughput display, which is off
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own Adam for the CPU keeps no average, and has to be compiled.
        "zero_force_ds_cpu_optimizer": False,
    }
