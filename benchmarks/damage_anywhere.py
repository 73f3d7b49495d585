"""Flips a bit, or cuts or fills, at a random byte of a random file of a store, and uses the store.

    python benchmarks/damage_anywhere.py --tries 200

The store has the whole workflow at tiny sizes, finished, and a second decoder that was stopped half-way. In each try
one file of a fresh copy is damaged. Then the store is looked at (`status`, `plan`, `compare`), the second decoder is
resumed and published, and a picture is made with the finished run. The damage was noticed if a line said so, and
harmless if all that came of it, files, rows, tables and the picture, is what comes of the undamaged store; then
`unclip verify --all` is asked too. Exits 1 where it was neither.
"""

import argparse
import io
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from stage_runs import TINY

from pipeline.cli import main as unclip
from pipeline.compose import compose_members
from pipeline.errors import UserError
from pipeline.terminal.tables import DAMAGED
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.frozen import read_frozen, write_frozen
from pipeline.workflow.plan import plan_run
from pipeline.workflow.progress import Outcome, latest_checkpoint_samples, read_failure
from pipeline.workflow.record import METRICS, without_measured
from pipeline.workflow.runs import record_run
from pipeline.workflow.sealed import warn
from stages import load
from tests.support.tiny_runs import plan_stages, rows_of, run_and_stop, run_stage_of, the_last_of_each_key

RUN, OTHER = "whole", "half"
CAPTION = "a red circle"
STEPS = 6
MEASURED = {"status", "compare"}
"""What tells times too: those of a file that was not damaged are the same."""

_TOLD = ("warning: /", "warning: checkpoint", "unclip:")


def main() -> None:
    """Make the store, then damage and use it so many times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    missed = []
    with tempfile.TemporaryDirectory() as directory:
        pristine, store = Path(directory) / "pristine", Path(directory) / "store"
        _make(store)
        store.rename(pristine)
        shutil.copytree(pristine, store)
        expected, said = _use(store)
        if said:
            raise SystemExit(f"the undamaged store is not used in silence: {said}")
        files = [path.relative_to(pristine) for path in sorted(pristine.rglob("*")) if path.is_file()]
        started = time.monotonic()
        for number in range(1, options.tries + 1):
            shutil.rmtree(store)
            shutil.copytree(pristine, store)
            file = rng.choice(files)
            kind = _damage(store / file, rng)
            found, said = _use(store)
            outcome = "noticed" if said else "harmless" if found == expected else "MISSED"
            counts[outcome] += 1
            counts["of the harmless, named by verify"] += outcome == "harmless" and not _is_verified(store)
            if outcome == "MISSED":
                missed.append(file)
                different = [name for name in expected if found.get(name) != expected[name]]
                print(f"{kind} {file}: {', '.join(different)} differ and nothing says so", flush=True)
            if number % 20 == 0:
                seconds = (time.monotonic() - started) / number
                print(f"{number} tries of {len(files)} files, {seconds:.1f} s each: {dict(counts)}", flush=True)
    if missed:
        raise SystemExit(f"{len(missed)} of {options.tries} were neither noticed nor harmless")


def _make(outputs: Path) -> None:
    for name, overrides in ((RUN, ()), (OTHER, _OF_THE_OTHER)):
        arguments = the_last_of_each_key(*TINY, f"run.name={name}", f"paths.outputs={outputs}", *overrides)
        (member,) = compose_members("unclip plan", arguments)
        record_run(plan_run(member.config, member.overrides))
        for stage, frozen in plan_stages(outputs, f"run.name={name}", *overrides).items():
            write_frozen(frozen)
            if name == OTHER and stage == "decoder":
                run_and_stop(frozen, when=lambda work=frozen.work: (latest_checkpoint_samples(work) or 0) >= 16)
                return
            if run_stage_of(frozen) not in (Outcome.FINISHED, Outcome.REUSED):
                raise SystemExit(f"{stage}: {read_failure(frozen.work)}")


_OF_THE_OTHER = (
    f"stage.decoder.max_samples={8 * STEPS}",
    "trainer.checkpoint_every_samples=8",
)


def _damage(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    kind = rng.choice(["flip", "flip", "cut", "zeros"]) if content else "insert"
    at = rng.randrange(max(1, len(content)))
    match kind:
        case "flip":
            changed = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case "cut":
            changed = content[:at]
        case "zeros":
            changed = content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
        case _:
            changed = rng.randbytes(8)
    path.write_bytes(changed)
    return kind


def _use(outputs: Path) -> tuple[dict[str, Any], str]:
    """What comes of the store, and what is said of damage."""
    warn.cache_clear()
    found: dict[str, Any] = {}
    notices = []
    for name, act in _uses(outputs).items():
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                found[name] = act()
        except UserError as error:
            notices.append(str(error))
        found[f"{name} says"] = out.getvalue() if name in MEASURED else ""
        notices += [line for line in err.getvalue().splitlines() if line.startswith(_TOLD)]
        notices += [line for line in out.getvalue().splitlines() if DAMAGED in line]
    return found, "\n".join(notices)


def _uses(outputs: Path) -> dict[str, Callable[[], Any]]:
    return {
        "status": lambda: [unclip(["status", name, "--outputs", str(outputs)]) for name in (RUN, OTHER)],
        "compare": lambda: unclip(["compare", RUN, OTHER, "--json", "--outputs", str(outputs)]),
        "plan": lambda: _planned(outputs),
        "resumed": lambda: _resumed(outputs),
        "picture": lambda: np.asarray(
            load(RUN, outputs=outputs, shows_progress=False)(CAPTION, seed=3)[0].image
        ).tobytes(),
    }


def _is_verified(outputs: Path) -> bool:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return unclip(["verify", "--all", "--outputs", str(outputs)]) == 0


def _planned(outputs: Path) -> list[tuple[str, str, str]]:
    arguments = the_last_of_each_key(*TINY, f"run.name={OTHER}", f"paths.outputs={outputs}", *_OF_THE_OTHER)
    (member,) = compose_members("unclip plan", arguments)
    plan = plan_run(member.config, member.overrides)
    damaged = [stage.reason for stage in plan.blocked]
    if damaged:
        raise UserError(damaged[0])
    return [(stage.name, stage.action.value, stage.reason) for stage in plan.stages]


def _resumed(outputs: Path) -> Any:
    """The second decoder as it is published: digests of its files, and its rows."""
    (path,) = (
        file for file in outputs.glob("work/decoder/*/frozen/*.json") if not _artifact_of(outputs, file).exists()
    )
    frozen = read_frozen(path)
    if run_stage_of(frozen) is not Outcome.FINISHED:
        failure = read_failure(frozen.work)
        assert failure is not None
        if not failure.is_user_error:
            return failure.message
        raise UserError(failure.message)
    artifact = ArtifactStore(outputs).open(*frozen.key)
    assert artifact is not None
    files = {file.path: file.sha256 for file in artifact.manifest.files if file.path != METRICS}
    return files, [without_measured(row) for row in rows_of(artifact)]


def _artifact_of(outputs: Path, frozen: Path) -> Path:
    return ArtifactStore(outputs).path("decoder", frozen.parent.parent.name)


if __name__ == "__main__":
    sys.exit(main())
