"""DALL·E 2 itself: what is trained, how it is sampled, how it is judged."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.generation.load import load as load


def __getattr__(name: str) -> Any:
    """`load` comes from `stages.generation.load` when it is first asked for: it reads all settings."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stages.generation.load import load

    return load
