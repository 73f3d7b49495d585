"""Which parameters of a network train, and at what share of the learning rate: by shell patterns of their names."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from pipeline.config import OptimizerSettings
from pipeline.errors import UserError

_CLOSE = 0.4
_SHOWN = 3


def freeze(network: nn.Module, patterns: Iterable[str], prefix: str = "") -> None:
    """Have the parameters whose names fit a pattern keep their values. Names are without `prefix`.

    Raises `UserError` where a pattern fits none, or nothing is left to train.
    """
    named = {name.removeprefix(prefix): each for name, each in network.named_parameters()}
    patterns = tuple(patterns)
    for pattern in patterns:
        for name in _matching(pattern, named, "optimizer.freeze"):
            named[name].requires_grad_(False)
    if patterns and not any(each.requires_grad for each in named.values()):
        raise UserError("optimizer.freeze leaves no parameter to train; freeze less, or set max_samples=0")


def learning_rate_factors(
    network: nn.Module, settings: OptimizerSettings, layers_above: Mapping[str, int] | None, prefix: str = ""
) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by its whole name; where several patterns fit, by each.

    `layers_above` says how many layers of a network follow that of a parameter; None where they have no order.
    Raises `UserError` where a pattern fits none, or a decay is asked for and there is no order.
    """
    factors = {name: 1.0 for name, _ in network.named_parameters()}
    if settings.layer_decay is not None:
        if layers_above is None:
            raise UserError(
                f"optimizer.layer_decay={settings.layer_decay:g}: this network has no sequence of blocks; use "
                "optimizer.learning_rate_factors"
            )
        factors = {name: settings.layer_decay ** layers_above[name] for name in factors}
    shown = {name.removeprefix(prefix): name for name in factors}
    for pattern, factor in (settings.learning_rate_factors or {}).items():
        for name in _matching(pattern, shown, "optimizer.learning_rate_factors"):
            factors[shown[name]] *= factor
    return factors


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        close = get_close_matches(pattern, names, n=_SHOWN, cutoff=_CLOSE) or names[:_SHOWN]
        raise UserError(f"{key}: {pattern!r} fits no parameter; there are for example {', '.join(close)}")
    return found
