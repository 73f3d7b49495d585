"""Disturbs a sweep on a real cluster at random moments, and compares it with one that nothing disturbed.

    python slurm/one_machine.py -- python benchmarks/slurm_disturbed.py --events 20

The sweep has two decoders that share all else. An event is one of: a stage's process is killed, or by the kernel as its
job comes to Slurm's memory limit (where the cluster has such limits); its job is requeued, signalled or preempted; its
node is set down. All the while `unclip gc` collects what no run needs, as in kill_anywhere.py. Where a job failed, the
same `unclip submit` is given again. In the end every artifact and row must be the undisturbed sweep's. Then the sweep
begins anew, until there were that many events. Exits 1 at the first difference.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from kill_anywhere import TINY, UNCLIP, collecting, compare, told_of_gc

from pipeline.overrides import key_of
from pipeline.workflow.runs import is_finished, read_runs
from tests.support.processes import exhaust_memory_limit

STEPS = 150
SWEEP = "disturbed"
TRAINED = ("clip", "prior", "decoder", "upsampler", "judge", "judge_clip")
SECONDS_TO_FINISH = 3600.0


def main() -> None:
    """Run the sweep undisturbed, then disturbed, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20.0, help="longest time between two events, in seconds")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole"
        started = time.monotonic()
        _submit(whole)
        _finish(whole)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        counts, collected = Counter[str](), Counter[str]()
        sweeps, starts = 0, 0
        while sum(counts.values()) < options.events:
            disturbed = Path(directory) / f"disturbed-{sweeps}"
            _submit(disturbed)
            with collecting(disturbed, whole, rng, collected, options.longest):
                while sum(counts.values()) < options.events and not _is_finished(disturbed):
                    time.sleep(rng.uniform(1, options.longest))
                    _disturb(disturbed, rng, counts)
                    _submit_again_if_failed(disturbed)
                _finish(disturbed)
            compare(whole, disturbed)
            assert _artifacts(whole) == _artifacts(disturbed), "a stage was made under another fingerprint"
            sweeps += 1
            starts += len(list(disturbed.glob("work/*/*/attempts/*.json")))
            print(f"{sweeps} sweeps: every artifact and row is the undisturbed one's", flush=True)
        print(f"{dict(counts)}; {starts} starts of {sweeps * len(_artifacts(whole))} stages")
        print(told_of_gc(collected))


def _disturb(outputs: Path, rng: random.Random, counts: Counter[str]) -> None:
    jobs = _said("squeue", "-h", "-t", "R", "-o", "%i").split()
    if jobs:
        event = rng.choice([_kill, _exhaust, _requeue, _signal, _preempt, _set_down])
        if not event(rng.choice(jobs), outputs):
            return
        counts[event.__name__.strip("_")] += 1
        print(f"{sum(counts.values())}: {event.__name__.strip('_')}", flush=True)


def _artifacts(outputs: Path) -> set[str]:
    return {str(path.parent.relative_to(outputs)) for path in outputs.glob("artifacts/*/*/manifest.json")}


def _overrides(outputs: Path) -> list[str]:
    lengths = [f"stage.{name}.max_samples={8 * STEPS}" for name in TRAINED]
    own = [f"run.name={SWEEP}", "stage.decoder.clip_loss.weight=0,0.1", "launch.mem_gib=2", "trainer.lease_s=20"]
    lines = [*lengths, *own, f"paths.outputs={outputs}"]
    return [*(each for each in TINY if key_of(each) not in map(key_of, lines)), *lines]


def _submit(outputs: Path) -> None:
    subprocess.run([UNCLIP, "submit", "-m", *_overrides(outputs)], check=True, stdout=subprocess.DEVNULL)


def _submit_again_if_failed(outputs: Path) -> None:
    """Where nothing is in the queue any more, or a job has failed, submit what is missing."""
    shown = _said(UNCLIP, "status", SWEEP, "--outputs", str(outputs))
    if not _said("squeue", "-h") or any(word in shown for word in ("FAILED", "CANCELLED", "held")):
        _submit(outputs)


def _is_finished(outputs: Path) -> bool:
    return all(is_finished(outputs, record) for record in read_runs(outputs, SWEEP))


def _finish(outputs: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_FINISH
    while not _is_finished(outputs):
        if time.monotonic() > deadline:
            raise SystemExit("the sweep did not finish")
        time.sleep(3)
        _submit_again_if_failed(outputs)


def _said(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout


def _worker(outputs: Path) -> psutil.Process | None:
    """A process that runs a stage."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if command[-1].startswith(f"{outputs}/") and "python" in command[0]:
            return process
    return None


def _kill(_job: str, outputs: Path) -> bool:
    worker = _worker(outputs)
    if worker is not None:
        worker.kill()
    return worker is not None


def _exhaust(_job: str, outputs: Path) -> bool:
    worker = _worker(outputs)
    return worker is not None and exhaust_memory_limit(worker.pid)


def _requeue(job: str, _outputs: Path) -> bool:
    _said("scontrol", "requeue", job)
    return True


def _signal(job: str, _outputs: Path) -> bool:
    _said("scancel", "--batch", "--signal=USR1", job)
    return True


def _preempt(_job: str, _outputs: Path) -> bool:
    _said("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    return True


def _set_down(job: str, _outputs: Path) -> bool:
    node = _said("squeue", "-h", "-j", job, "-o", "%N").strip()
    if node:
        _said("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=benchmark")
        time.sleep(8)
        _said("scontrol", "update", f"NodeName={node}", "State=RESUME")
    return bool(node)


if __name__ == "__main__":
    sys.exit(main())
