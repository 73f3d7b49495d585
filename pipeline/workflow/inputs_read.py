"""Which contents of its inputs a stage in progress is made from, as it began: `inputs.json` in its work directory."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.sealed import read_or_none, write_json_atomically

INPUTS = "inputs.json"
_INPUTS = TypeAdapter(dict[str, str])


def begin_with(work: Path, inputs: Iterable[Artifact], *, goes_on: bool) -> None:
    """Write down what is read; whoever `goes_on` from a checkpoint keeps what that was made from."""
    if not goes_on:
        write_json_atomically(work / INPUTS, {each.name: each.content_sha256 for each in inputs})


def inputs_read(work: Path) -> dict[str, str]:
    """Digests of contents by `stage/fingerprint`; {} where nothing is known of them."""
    return read_or_none(_INPUTS, work / INPUTS, "which bytes of its inputs it is made from is not known") or {}
