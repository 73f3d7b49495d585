"""`unclip gc` on stores of all sorts, stopped and killed at any moment."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.store.collect import pin
from pipeline.store.trash import in_trash
from pipeline.workflow.artifacts import ArtifactStore
from pipeline.workflow.frozen import StageKey
from pipeline.workflow.progress import CHECKPOINTS
from pipeline.workflow.runs import run_directory
from tests.support.stores import (
    Stages,
    begin,
    collect,
    contents,
    finish,
    key_of,
    keys,
    own,
    record,
    stopped_after,
    there,
    with_inputs,
)

WIDTHS, WEIGHTS = (1, 2, 3), (0.1, 0.2)


@pytest.mark.parametrize("seed", range(12))
def test_of_any_store_exactly_what_nobody_needs_is_removed(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    runs: dict[str, list[Stages]] = {}
    for number in range(rng.randint(1, 6)):
        name = f"run{number}"
        for _ in range(rng.randint(1, 3)):
            runs.setdefault(name, []).append(
                record(tmp_path, name, width=rng.choice(WIDTHS), weight=rng.choice(WEIGHTS))
            )
    everything = [stage for configs in runs.values() for stages in configs for stage in stages.values()]
    finished, begun = set[StageKey](), set[StageKey]()
    for stage in everything:
        draw = rng.random()
        if draw < 0.7 and key_of(stage) not in finished | begun:
            finish([stage])
            finished.add(key_of(stage))
        elif draw < 0.85 and key_of(stage) not in finished | begun:
            begin([stage])
            begun.add(key_of(stage))
    pinned = {name for name in runs if rng.random() < 0.3}
    for name in pinned:
        pin(tmp_path, name, is_pinned=True)
    removed = {name for name in runs if rng.random() < 0.4}
    for name in removed:
        shutil.rmtree(run_directory(tmp_path, name))
    owners, owned = [], set[StageKey]()
    for configs in runs.values():
        for stages in configs:
            name = rng.choice([*stages])
            if rng.random() < 0.2 and key_of(stages[name]) in begun:
                owners.append(own(stages[name]))
                owned |= with_inputs(stages, name)
    kept = {name: configs if name in pinned else configs[-1:] for name, configs in runs.items() if name not in removed}
    needed = {key for configs in kept.values() for stages in configs for key in keys(stages)} | owned
    with_checkpoints = {key for name in pinned - removed for stages in kept[name] for key in keys(stages)} | owned
    before = contents(tmp_path)
    collect(tmp_path)
    assert there(tmp_path) == finished & needed
    assert there(tmp_path, "work") >= (finished | begun) & needed
    assert there(tmp_path, "work") <= needed
    assert there(tmp_path, "work", CHECKPOINTS) == (begun & needed) | (finished & with_checkpoints)
    assert {key: before[key] for key in contents(tmp_path)} == contents(tmp_path)
    for owner in owners:
        owner.release()


def test_stopped_between_any_two_steps_it_leaves_whole_artifacts_and_the_next_one_ends_it(tmp_path: Path):
    kept = record(tmp_path, "first")
    finish(kept.values())
    whole = contents(tmp_path, ["artifacts"])
    steps = 0
    for steps in range(100):
        finish(each for each in record(tmp_path, "second", weight=0.9).values() if key_of(each) not in there(tmp_path))
        shutil.rmtree(run_directory(tmp_path, "second"))
        with stopped_after(steps) as stopped:
            collect(tmp_path)
        for key in there(tmp_path):
            artifact = ArtifactStore(tmp_path).find(*key)
            assert artifact is not None
            artifact.opened()
        assert keys(kept) <= there(tmp_path)
        if not stopped.is_set():
            break
    assert steps > 5
    assert in_trash(tmp_path) == []
    assert there(tmp_path) == there(tmp_path, "work") == keys(kept)
    assert contents(tmp_path, ["artifacts"]) == whole


GC = """
import sys
from pathlib import Path
from pipeline.store.collect import find, take_away
from pipeline.store.trash import empty_trash
outputs = Path(sys.argv[1])
found = find(outputs, {}, older_than_s=0.0, keeps_checkpoints=False, takes_caches=False)
print("found", flush=True)
take_away(outputs, found.going, {})
empty_trash(outputs)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_leaves_a_valid_store(tmp_path: Path):
    rng = random.Random(0)
    kept = record(tmp_path, "kept")
    finish(kept.values())
    before = {path: content for path, content in contents(tmp_path).items() if CHECKPOINTS not in path}
    killed = 0
    for number in range(30):
        stages = [record(tmp_path, f"gone{width}", width=width) for width in range(10, 16)]
        finish(stage for each in stages for stage in each.values() if key_of(stage) not in there(tmp_path))
        for width in range(10, 16):
            shutil.rmtree(run_directory(tmp_path, f"gone{width}"))
        with subprocess.Popen([sys.executable, "-c", GC, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        for key in there(tmp_path):
            artifact = ArtifactStore(tmp_path).find(*key)
            assert artifact is not None, (number, key)
            artifact.opened()
        assert contents(tmp_path).items() >= before.items()
    collect(tmp_path)
    assert killed > 5
    assert in_trash(tmp_path) == []
    assert there(tmp_path) == there(tmp_path, "work") == keys(kept)
