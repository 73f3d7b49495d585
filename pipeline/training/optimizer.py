"""AdamW whose state holds the averaged weights, and the learning rate on the `samples_seen` axis."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW

from pipeline.config import DecayKind, OptimizerSettings

EMA = "ema"
RANGE = "range"
_AVERAGED_AT_ONCE = 2**26
"""Elements of the average that a step moves at a time on a GPU."""


class AdamWithEma(AdamW):
    """AdamW that keeps an exponential moving average of every parameter as optimiser state.

    As state it is saved, resumed and (under ZeRO) sharded with the moments. The decay of step n is
    min(ema_decay, (1 + n) / (10 + n)), so that a short run's average is not its initial weights. A group of parameters
    with a `range` is kept in it after every step. Nothing here waits for a GPU.
    """

    def __init__(self, parameters: Iterable[Any], *, ema_decay: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        # Gradients are measured before the step, so they are unscaled by then: not in the fused kernel.
        self._step_supports_amp_scaling = False
        self.ema_decay = ema_decay
        self._is_fused = bool(self.defaults["fused"])
        self._skips_step = False
        # What torch's fused kernel divides the gradient by, and whether (1.0) it leaves everything as it is.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def prepare_step(self, gradient_norm: Tensor, max_norm: float | None) -> None:
        """Say of the next step's gradient that its norm is float []; it is to be clipped to `max_norm`, if that is set.

        The step leaves weights, moments and averages as they are where the norm is not finite.
        """
        if self._is_fused:
            self.found_inf = (~torch.isfinite(gradient_norm)).float()
            self.grad_scale = None if max_norm is None else (gradient_norm / max_norm).clamp(min=1.0).float()
            return
        self._skips_step = not bool(torch.isfinite(gradient_norm))
        if max_norm is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            clip_grads_with_norm_(parameters, max_norm, gradient_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One AdamW step, then one step of the average."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._skips_step:
            return loss
        super().step()
        for group in self.param_groups:
            if group.get(RANGE) is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group[RANGE])
        if self.ema_decay == 0:
            return loss
        averages, weights = [], []
        steps = torch.zeros(())
        for parameter, state in self._trained():
            if EMA not in state:
                state[EMA] = parameter.detach().clone()
            averages.append(state[EMA])
            weights.append(parameter)
            steps = state["step"]
        share = 1.0 - ((1.0 + steps.double()) / (10.0 + steps.double())).clamp(max=self.ema_decay)
        if self.found_inf is not None:
            share = share * (1.0 - self.found_inf.to(share.device))
        # A number that is on a GPU is left there: asking for it would wait.
        if share.is_cpu:
            torch._foreach_lerp_(averages, weights, float(share))
        else:
            _move_on_the_device(weights, averages, share)
        return loss

    def _trained(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every parameter that has taken a step, with its state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "step" in self.state.get(parameter, {}):
                    yield parameter, self.state[parameter]


def _move_on_the_device(weights: list[Tensor], averages: list[Tensor], share: Tensor) -> None:
    """averages += share (weights - averages), with share float []. Of the differences only a part is held at once."""
    while averages:
        count, elements = 0, 0
        while count < len(averages) and elements < _AVERAGED_AT_ONCE:
            elements += averages[count].numel()
            count += 1
        differences = torch._foreach_sub(weights[:count], averages[:count])
        torch._foreach_mul_(differences, share.to(differences[0].dtype))
        torch._foreach_add_(averages[:count], differences)
        weights, averages = weights[count:], averages[count:]


def build_optimizer(
    network: nn.Module,
    settings: OptimizerSettings,
    ranges: Mapping[str, tuple[float, float]],
    factors: Mapping[str, float] | None = None,
    *,
    fused: bool,
) -> AdamWithEma:
    """AdamW over the parameters that train; vectors (norms, biases, learned embeddings) are not decayed.

    The parameters that `ranges` names are kept between its two numbers. `factors` multiply the learning rate of those
    that they name.
    """
    factors = factors or {}
    trained = {name: each for name, each in network.named_parameters() if each.requires_grad}
    alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, each in trained.items():
        if name not in ranges:
            alike.setdefault((factors.get(name, 1.0), each.ndim >= 2), []).append(each)
    groups: list[dict[str, Any]] = [
        _group(alike[factor, is_matrix], settings, factor, settings.weight_decay if is_matrix else 0.0)
        for factor, is_matrix in sorted(alike, reverse=True)
    ]
    for name in ranges:
        if name in trained:
            groups.append(_group([trained[name]], settings, factors.get(name, 1.0), 0.0) | {RANGE: ranges[name]})
    return AdamWithEma(
        groups,
        ema_decay=settings.ema_decay,
        fused=fused,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def _group(
    parameters: list[nn.Parameter], settings: OptimizerSettings, factor: float, weight_decay: float
) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": weight_decay, "lr": settings.learning_rate * factor}


def learning_rate_factor(settings: OptimizerSettings, samples_seen: int, max_samples: int) -> float:
    """The share of `learning_rate` that applies after `samples_seen`: linear warm-up, then the decay, in [0, 1]."""
    if samples_seen < settings.warmup_samples:
        return (samples_seen + 1) / (settings.warmup_samples + 1)
    final = settings.final_learning_rate_share
    span = max(1, max_samples - settings.warmup_samples)
    progress = min(1.0, (samples_seen - settings.warmup_samples) / span)
    match settings.decay:
        case DecayKind.CONSTANT:
            return 1.0
        case DecayKind.LINEAR:
            return 1.0 - (1.0 - final) * progress
        case DecayKind.COSINE:
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
