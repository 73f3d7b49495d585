"""The names and shapes of weights in a file, read from its header: without torch, and no code in it is ever run."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.errors import UserError

Shape = tuple[int, ...]
SAFETENSORS = ".safetensors"
WEIGHTS_SUFFIXES = (SAFETENSORS, ".bin", ".pth", ".pt")
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2")
_PICKLES_BEFORE = 3
"""In a file of PyTorch before 1.6: a magic number, a version, and sizes of C's types."""


def weight_shapes(file: Path) -> dict[str, Shape]:
    """Of a safetensors file, a state dict that PyTorch wrote, or a training checkpoint with a `state_dict` in it.

    Raises `UserError` for any other file, and for one that is damaged or could be read by running code in it alone.
    """
    try:
        content = _safetensors_shapes(file) if file.suffix == SAFETENSORS else _pickled_shapes(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); give a file that is whole") from error
    except Exception as error:  # both formats' readers raise whatever a broken or a foreign file leads to
        raise UserError(
            f"{file} is no file of plain weights, or not whole ({type(error).__name__}: {error}); save the model's "
            "state_dict() as .safetensors or .pt"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(shape, tuple) for shape in weights.values()):
        raise UserError(f"{file} holds no state dict; save the model's state_dict() as .safetensors or .pt")
    return dict(weights)


def require_fit(
    own: Mapping[str, Shape],
    found: Mapping[str, Shape],
    said: str,
    remedy: str,
    may_lack: Collection[str] = (),
    may_exceed: Collection[str] = (),
) -> None:
    """Raise `UserError`, which begins with `said`, unless weights `found` are those of a network that has `own`.

    One number fits another, whatever their dimensions.
    """
    others = [name for name in own if name in found and not _are_alike(own[name], found[name])]
    missing = [name for name in own if name not in found and name not in may_lack]
    unknown = [name for name in found if name not in own and name not in may_exceed]
    if others:
        what = f"{others[0]} has shape {list(found[others[0]])} there and {list(own[others[0]])} here"
    elif missing:
        what = f"it lacks {missing[0]}"
    elif unknown:
        what = f"it has {unknown[0]} in excess"
    else:
        return
    fitting = len(own.keys() & found.keys()) - len(others)
    raise UserError(f"{said} does not fit: {what} ({fitting} of {len(own)} weights fit); {remedy}")


def _are_alike(one: Shape, other: Shape) -> bool:
    return one == other or prod(one) == prod(other) == 1


def _safetensors_shapes(file: Path) -> dict[str, Shape]:
    with safe_open(file, framework="numpy") as content:
        return {name: tuple(content.get_slice(name).get_shape()) for name in list(content.keys())}


def _pickled_shapes(file: Path) -> Any:
    with file.open("rb") as stream:
        if stream.peek(2)[:2] == b"PK":
            with zipfile.ZipFile(stream) as archive:
                (name,) = (each for each in archive.namelist() if each.rpartition("/")[2] == "data.pkl")
                with archive.open(name) as pickled:
                    return _Shapes(pickled).load()
        for _ in range(_PICKLES_BEFORE):
            _Shapes(stream).load()
        return _Shapes(stream).load()


class _Shapes(pickle.Unpickler):
    """Reads of each tensor its shape. Nothing that a pickle names is imported."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name in _TENSORS:
            return lambda _storage, _offset, size, *_rest: tuple(size)
        if global_name == "_rebuild_parameter":
            return lambda shape, *_rest: shape
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module_name.partition(".")[0] == "torch":
            return lambda *_: None
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> None:
        """Of a storage nothing is read."""
