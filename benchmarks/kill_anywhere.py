"""Kills a whole tiny workflow at random moments, restarts it, and compares it with one that nothing disturbed.

    python benchmarks/kill_anywhere.py --kills 100 --devices 2 --workers 1 --gc

Each attempt runs `unclip run` for a random time, then every process of it is killed. When the workflow is finished
its artifacts are compared with the undisturbed ones, byte by byte, and so are the rows of every trained stage: a sample
that was repeated or lost would show in them. Then it begins anew, until there were that many kills. Exits 1 at the
first difference.

With --gc, `unclip gc --older-than 0m --delete` runs again and again beside it, and half of those are killed as well.
Before each, something is left there that no run needs: an artifact or a work folder of another fingerprint, a build or
code that was half written. In the end all of that is gone, and no artifact of the run was ever taken.
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

from pipeline.workflow.artifacts import MANIFEST, Artifact, read_artifact
from pipeline.workflow.digests import describe_files
from pipeline.workflow.record import METRICS, without_measured
from pipeline.workflow.sealed import read_json, write_json_atomically
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
ORPHANS = ("artifacts", "work folders", "builds", "code")
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
            with collecting(disturbed, whole, rng, collected) if options.gc else nullcontext():
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
        print(told_of_gc(collected))


def told_of_gc(collected: Counter[str]) -> str:
    """How often it ran, and what it took."""
    runs = f"gc beside it: {collected['ended']} ended ({collected['freed']} freed space), {collected['killed']} killed"
    return f"{runs}; of what no run needs all is gone: " + ", ".join(f"{collected[kind]} {kind}" for kind in ORPHANS)


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


def leave_orphan(outputs: Path, whole: Path, rng: random.Random) -> tuple[str, Path]:
    """Leave something that no run needs, copied from a finished store: its kind, and where."""
    kind, fingerprint = rng.choice(ORPHANS), rng.randbytes(32).hex()
    made = rng.choice(sorted(path.parent for path in whole.glob("artifacts/*/*/manifest.json")))
    stage = made.parent.name
    if kind == "code":
        path = outputs / "code" / f".{fingerprint[:16]}-1"
        path.mkdir(parents=True)
        (path / "half.py").write_text("import")
    elif kind == "work folders":
        path = outputs / "work" / stage / fingerprint
        shutil.copytree(whole / "work" / stage / made.name, path)
    else:
        name = fingerprint if kind == "artifacts" else f".building-{fingerprint}-1"
        path = outputs / "artifacts" / stage / name
        shutil.copytree(made, path)
        write_json_atomically(path / MANIFEST, {**read_json(path / MANIFEST), "fingerprint": fingerprint})
    return kind, path


@contextmanager
def collecting(
    outputs: Path, whole: Path, rng: random.Random, collected: Counter[str], longest_pause_s: float = 10.0
) -> Iterator[None]:
    """Collect what no run needs of the store, all the while, and give it some.

    Exits where a collection fails, takes an artifact of the run, or leaves in the end what it was given.
    """
    command = [UNCLIP, "gc", "--older-than", "0m", "--delete", "--outputs", str(outputs)]
    own, is_over, faults = random.Random(rng.random()), threading.Event(), list[str]()
    seen: dict[Path, int] = {}
    orphans: list[Path] = []

    def collect() -> None:
        while not is_over.wait(own.uniform(0, longest_pause_s)) and not faults:
            # What begins with a dot is being built: it has its manifest for a moment before it is renamed.
            published = [path.parent for path in outputs.glob(f"artifacts/*/[!.]*/{MANIFEST}")]
            there = {path: path.stat().st_ino for path in published if path not in orphans}
            faults.extend(f"{path} was taken" for path, inode in seen.items() if there.get(path) != inode)
            seen.update(there)
            if not (outputs / "runs").is_dir():
                continue
            kind, orphan = leave_orphan(outputs, whole, own)
            orphans.append(orphan)
            collected[kind] += 1
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
    if orphans:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    faults.extend(f"{path} was left" for path in orphans if path.exists())
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
