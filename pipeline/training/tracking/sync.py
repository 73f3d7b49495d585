"""`unclip sync`: uploads the W&B runs that were kept in files, each start once and in order, by `wandb sync`."""

import argparse
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.training.tracking.wandb_record import RECORD, WANDB_PROGRAM, fragments, read_record, started
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.progress import read_progress
from pipeline.workflow.runs import read_runs

_SECONDS_TO_ANSWER = 10.0


def main(arguments: Sequence[str]) -> int:
    """Upload; the exit status is 0, also where there was nothing to do."""
    parser = argparse.ArgumentParser("unclip sync", description="Upload W&B runs that were tracked offline, once.")
    parser.add_argument("run", nargs="?", help="name of a run or sweep; without it, all stages")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="paths.outputs of the run")
    options = parser.parse_args(arguments)
    outputs = options.outputs.absolute()
    import wandb

    result = sync(_works(outputs, options.run), wandb.setup().settings.base_url)
    for log in result.left:
        print(f"left for later, as it is being written: {log.parent}")
    if not result.uploaded:
        print("nothing to upload")
    return 0


@dataclass(frozen=True)
class Synced:
    """How many starts were uploaded, and the logs of those that are still being written."""

    uploaded: int
    left: list[Path]


def sync(works: Sequence[Path], server: str, program: Sequence[str] = WANDB_PROGRAM) -> Synced:
    """Upload what is not uploaded of these stages' work, in the order of the starts.

    Raises `UserError` at the first that fails: a later start of the same run must not come before it.
    """
    pending = [(work, log) for work in works for log in _not_uploaded(work)]
    left = [log for work, log in pending if _is_open(work, log)]
    ready = sorted((log for _, log in pending if log not in left), key=started)
    if ready:
        _require(server)
    for log in ready:
        _upload(log, program)
    return Synced(len(ready), left)


def _works(outputs: Path, run: str | None) -> list[Path]:
    if run is None:
        return [path.parent for path in outputs.glob(f"work/*/*/{RECORD}")]
    store = ArtifactStore(outputs)
    stages = {(each.name, each.fingerprint) for record in read_runs(outputs, run) for each in record.stages}
    return [store.work(name, fingerprint) for name, fingerprint in sorted(stages)]


def _not_uploaded(work: Path) -> list[Path]:
    """The logs of offline starts without the mark that `wandb sync` leaves beside what it has uploaded."""
    return [log for log in fragments(work) if log.parent.name.startswith("offline-") and not _mark(log).exists()]


def _mark(log: Path) -> Path:
    return log.with_suffix(".wandb.synced")


def _is_open(work: Path, log: Path) -> bool:
    """Whether a process may still write to this log; that of a killed one is closed once it has long been silent."""
    record, progress = read_record(work), read_progress(work)
    is_silent = progress is None or progress.is_silent
    return record is not None and record.open_fragment == log.parent.name and not is_silent


def _require(server: str) -> None:
    """Ask before, since `wandb sync` tries for very long. Any answer of the server will do."""
    try:
        urllib.request.urlopen(server, timeout=_SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise UserError(
            f"the W&B server {server} is not reached ({error}); nothing was uploaded: try again with a network"
        ) from error


def _upload(log: Path, program: Sequence[str]) -> None:
    said = subprocess.run(
        [*program, "sync", str(log.parent)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if not _mark(log).exists():
        last = next((line for line in reversed(said.stdout.splitlines()) if line.strip()), "it said nothing")
        raise UserError(f"wandb sync {log.parent} did not upload it: {last}; see `wandb login`, then run this again")
    print(f"uploaded {log.parent.name} ({log.parents[3].name})")
