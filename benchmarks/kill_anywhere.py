"""Kills a whole tiny workflow at random moments, restarts it, and compares it with one that nothing disturbed.

    python benchmarks/kill_anywhere.py --kills 100 --devices 2 --workers 1 --gc

Each attempt runs `unclip run` for a random time, then every process of it is killed. When the workflow is finished
its artifacts are compared with the undisturbed ones, byte by byte, and so are the rows of every trained stage: a sample
that was repeated or lost would show in them. Then it begins anew, until there were that many kills. Exits 1 at the
first difference.

With --gc, `unclip gc --older-than 0m --delete` runs again and again beside it, and half of those are killed as well. No
artifact of the run may be taken.
"""

import argparse
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
from stage_runs import TINY as OF_THE_TESTS

from pipeline.workflow.artifacts import Artifact, describe_files, read_artifact
from pipeline.workflow.record import METRICS, without_measured
from tests.support.tiny_runs import rows_of, the_last_of_each_key

UNCLIP = str(Path(sys.executable).parent / "unclip")
STEPS = 40
TINY = the_last_of_each_key(
    *OF_THE_TESTS,
    "run.name=tiny",
    "trainer.checkpoint_every_samples=16",
    "stage.decoder.clip_loss.weight=0.1",
    *(
        f"stage.{name}.{key}={value}"
        for name in ("clip", "prior", "decoder", "upsampler", "judge", "judge_clip")
        for key, value in (("global_batch_size", 8), ("max_samples", 8 * STEPS))
    ),
)
NOT_COMPARED = {"metrics.jsonl", "manifest.json"}
"""Their rows hold speeds, times and the commit; of the one the rows, of the other the metrics are compared."""


def main() -> None:
    """Run undisturbed, then kill and restart until there were enough kills."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--longest", type=float, default=15.0, help="longest life of an attempt, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gc", action="store_true", help="collect what no run needs at random moments beside it")
    options = parser.parse_args()
    run = [UNCLIP, "run", *TINY, f"trainer.devices={options.devices}", f"trainer.loader_workers={options.workers}"]
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole"
        started = time.monotonic()
        subprocess.run([*run, f"paths.outputs={whole}"], check=True, stdout=subprocess.DEVNULL)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        kills, workflows, killed_in, collected = 0, 0, Counter[str](), Counter[str]()
        while kills < options.kills:
            disturbed = Path(directory) / f"disturbed-{workflows}"
            command = [*run, f"paths.outputs={disturbed}"]
            with _collecting(disturbed, rng, collected) if options.gc else nullcontext():
                while kills < options.kills and not _runs_until_killed(command, rng.uniform(1, options.longest), rng):
                    kills += 1
                    killed_in[_stage_in_progress(disturbed)] += 1
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            workflows += 1
            compare(whole, disturbed)
            print(f"{kills} kills, {workflows} workflows: every artifact and row is the undisturbed one's", flush=True)
            shutil.rmtree(disturbed)
    where = ", ".join(f"{stage} {count}" for stage, count in killed_in.most_common())
    print(f"killed in: {where}")
    if options.gc:
        print(
            f"gc beside it: {collected['ended']} ended, {collected['killed']} killed; {collected['freed']} freed space"
        )


def _runs_until_killed(command: list[str], life_s: float, rng: random.Random) -> bool:
    """Whether the workflow was finished within its life; if not, all its processes are dead now."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if process.wait(timeout=life_s) != 0:
            raise SystemExit(f"`{shlex.join(command)}` failed with exit status {process.returncode}")
        return True
    except subprocess.TimeoutExpired:
        pass
    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    rng.shuffle(victims)
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims)
    process.wait()
    return False


@contextmanager
def _collecting(outputs: Path, rng: random.Random, collected: Counter[str]) -> Iterator[None]:
    """Collect what no run needs of the store, all the while. Exits where one fails or takes an artifact of the run."""
    command = [UNCLIP, "gc", "--older-than", "0m", "--delete", "--outputs", str(outputs)]
    own, is_over, faults = random.Random(rng.random()), threading.Event(), list[str]()
    seen: dict[Path, int] = {}

    def collect() -> None:
        while not is_over.wait(own.uniform(0, 2)) and not faults:
            there = {path.parent: path.parent.stat().st_ino for path in outputs.glob("artifacts/*/*/manifest.json")}
            faults.extend(f"{path} was taken" for path, inode in seen.items() if there.get(path) != inode)
            seen.update(there)
            if not (outputs / "runs").is_dir():
                continue
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                said, error = process.communicate(timeout=own.choice((None, own.uniform(0.5, 4))))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                collected["killed"] += 1
                continue
            collected["ended"] += 1
            collected["freed"] += "\n0 B freed" not in f"\n{said}"
            if process.returncode != 0:
                faults.append(f"`{shlex.join(command)}` failed: {error}")

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if faults:
        raise SystemExit(faults[0])


def _stage_in_progress(outputs: Path) -> str:
    """The stage that has made no artifact and was worked on last."""
    logs = sorted(outputs.glob("work/*/*/log.txt"), key=lambda path: path.stat().st_mtime)
    return logs[-1].parent.parent.name if logs else "starting"


def compare(whole: Path, disturbed: Path) -> None:
    """Exit at the first artifact that differs from the undisturbed one."""
    for manifest in sorted(whole.glob("artifacts/*/*/manifest.json")):
        place = manifest.parent.relative_to(whole)
        expected, found = (read_artifact(outputs / place) for outputs in (whole, disturbed))
        assert expected is not None
        assert found is not None, f"{place} was not made again"
        different = sorted({name for name, _ in _digests(expected.path).items() ^ _digests(found.path).items()})
        if different:
            raise SystemExit(f"{place}: {', '.join(different)} differ from the undisturbed ones")
        if expected.manifest.metrics != found.manifest.metrics:
            raise SystemExit(f"{place}: its metrics are not the undisturbed ones")
        if (expected.path / METRICS).exists() and _rows(expected) != _rows(found):
            raise SystemExit(f"{place}: its rows are not the undisturbed ones")


def _digests(artifact: Path) -> dict[str, str]:
    return {each.path: each.sha256 for each in describe_files(artifact) if each.path not in NOT_COMPARED}


def _rows(artifact: Artifact) -> list[dict[str, float]]:
    return [without_measured(row) for row in rows_of(artifact)]


if __name__ == "__main__":
    main()
