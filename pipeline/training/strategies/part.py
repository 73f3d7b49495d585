"""What one process contributes to a checkpoint: taken while training waits, and written while it may go on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

FILE_BYTES = 2**30
_PIECE_BYTES = 2**24
_ALIGNMENT = 8


class WriteCancelledError(Exception):
    """A write was given up before its end."""


@dataclass(frozen=True)
class CheckpointPart:
    """The files of one process in the directory of a checkpoint.

    `whole_files` are contents by name. `tensors` are float32 [n] by name, for safetensors files `stem`.NNN.safetensors.
    If `is_copied`, training can go on while they are written; else they are what training changes.
    """

    directory: Path
    whole_files: Mapping[str, bytes]
    stem: str
    tensors: Sequence[tuple[str, Tensor]]
    is_copied: bool

    def write(self, cancelled: Event) -> dict[str, str]:
        """Write the files and flush them to disk; their names and SHA-256 (hex). No other process is needed.

        Raises `OSError` where that fails, and `WriteCancelledError` soon after `cancelled` is set.
        """
        digests = {
            name: _write(self.directory / name, [memoryview(content)], cancelled)
            for name, content in self.whole_files.items()
        }
        return digests | write_tensors(self.directory, self.stem, self.tensors, cancelled)


def write_tensors(
    directory: Path,
    stem: str,
    tensors: Sequence[tuple[str, Tensor]],
    cancelled: Event,
    *,
    file_bytes: int = FILE_BYTES,
) -> dict[str, str]:
    """Write float32 tensors [n] to safetensors files, each of which is closed at `file_bytes`; names and digests.

    The library's own writer would copy a file's tensors first, and let no other thread run meanwhile.
    """
    groups: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for named in tensors:
        if size >= file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(named)
        size += named[1].nbytes
    digests = {}
    for number, group in enumerate(groups):
        name = f"{stem}.{number:03}.safetensors"
        digests[name] = _write(directory / name, _contents(group), cancelled)
    return digests


def _contents(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[memoryview]:
    """A safetensors file: the header's length, the header, and one tensor after the other."""
    header, end = {}, 0
    for name, tensor in tensors:
        assert tensor.dtype is torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for _, tensor in tensors:
        yield tensor.detach().cpu().view(torch.uint8).numpy().data


def _write(path: Path, contents: Iterator[memoryview] | Sequence[memoryview], cancelled: Event) -> str:
    """Write and flush; the SHA-256 (hex) of what was meant, whatever the disk makes of it."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in contents:
            for start in range(0, len(content), _PIECE_BYTES):
                if cancelled.is_set():
                    raise WriteCancelledError
                piece = content[start : start + _PIECE_BYTES]
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
