"""W&B's own logs (`*.wandb`): the end that a kill tore off, and the rows in them.

They are logs as LevelDB has them: blocks of 32 KiB with records in parts, each with a head of 7 bytes (a checksum of 4,
the length of 2, the type of 1). The file begins with 7 bytes of W&B's.
"""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.workflow.record import AXIS

WANDB_PROGRAM = (sys.executable, "-m", "wandb")
HEAD_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_PART = struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4
"""The types of a part that ends a record."""


def cut_to_whole_records(log: Path) -> bool:
    """Cut off what is left of a record that a kill kept from being written; whether there was any.

    `wandb sync` uploads the rows of a log that ends in such a one, calls it a failure, and would upload them again. The
    log as it was stays beside it, as `*.wandb.uncut`.
    """
    content = log.read_bytes()
    end = _end_of_whole_records(content)
    if end == len(content):
        return False
    shutil.copyfile(log, log.with_suffix(".wandb.uncut"))
    temporary = log.with_suffix(".tmp")
    temporary.write_bytes(content[:end])
    temporary.replace(log)
    return True


def _end_of_whole_records(content: bytes) -> int:
    position = end = HEAD_BYTES
    while position + _PART.size <= len(content):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _PART.size:
            position += left_in_block
            continue
        _, length, kind = _PART.unpack_from(content, position)
        position += _PART.size + length
        if kind == 0 or position > len(content):  # zeros are what a power cut leaves
            break
        if kind in (_WHOLE, _LAST):
            end = position
    return end


def history(log: Path) -> Iterator[dict[str, Any]]:
    """The rows in a log, in order, as W&B's own reader gives them: as far as it goes where a kill cut it short."""
    said = subprocess.run([*WANDB_PROGRAM, "leet", "inspect", "--json", str(log)], capture_output=True, check=False)
    if said.returncode and not said.stdout:
        last = next(iter(reversed(said.stderr.decode(errors="replace").strip().splitlines())), "it said nothing")
        print(f"warning: W&B: {log} was not read ({last}); rows in it may be sent again", flush=True)
    for line in said.stdout.splitlines():
        record = json.loads(line)
        if record.get("type") == "history" and AXIS in record["history"]["item"]:
            yield record["history"]["item"]
