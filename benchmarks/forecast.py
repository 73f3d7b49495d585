"""What `unclip plan --forecast` says of stages on this machine, beside what they then take.

    python benchmarks/forecast.py run.name=forecast stage.clip.max_samples=16384 trainer.cpu_threads=1

Each stage that is left to do is forecast and then run, in this process. Its seconds of the processors (others may use
the machine too), its memory, and the bytes of its artifact and of a checkpoint: as forecast, as measured, their ratio.
"""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline.compose import compose_members
from pipeline.forecast.estimate import StageForecast, forecast
from pipeline.terminal.tables import new_table
from pipeline.training.stage import run_stage
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.plan import Plan, plan_run
from pipeline.workflow.progress import CHECKPOINTS, Outcome
from pipeline.workflow.record import MEASURED, read_standing

MEMORY = f"{MEASURED}memory_mib"


def main() -> None:
    """Forecast and run every stage, one after the other."""
    (member,) = compose_members("benchmarks/forecast.py", sys.argv[1:])

    def planned() -> Plan:
        return plan_run(member.config, member.overrides)

    table = new_table("forecast / measured", "stage", "what", "forecast", "measured", "ratio")
    for name in [stage.name for stage in planned().stages]:
        (said,) = forecast(planned(), only=[name]).stages
        stage = next(each for each in planned().stages if each.name == name)
        assert stage.frozen is not None, f"{name} is blocked: {stage.reason}"
        started = time.process_time()
        outcome = run_stage(stage.frozen, threading.Event())
        processor_s = time.process_time() - started
        if outcome is not Outcome.FINISHED:
            print(f"{name}: {outcome}", flush=True)
            continue
        for what, expected, found in compared(said, stage.frozen, processor_s):
            row = (name, what, f"{expected:,.4g}", f"{found:,.4g}", f"{expected / found:.2f}")
            table.add_row(*row)
            print(*row, flush=True)
    Console().print(table)


def compared(said: StageForecast, frozen: FrozenStage, processor_s: float) -> Iterator[tuple[str, float, float]]:
    """What was forecast of a stage and can be measured: its name, as forecast, as measured."""
    artifact = frozen.store.find(frozen.stage, frozen.fingerprint)
    assert artifact is not None, "it is finished"
    weights = sum(file.size for file in artifact.manifest.files)
    if said.processor_s is not None:
        yield "processor s", said.processor_s, processor_s
    if said.artifact_bytes is not None:
        yield "artifact MB", said.artifact_bytes / 1e6, weights / 1e6
    checkpoints = sorted((frozen.work / CHECKPOINTS).glob("*.ckpt"))
    if checkpoints and said.work_bytes:
        each = said.work_bytes / max(2, frozen.trainer.keep_checkpoints)
        yield "checkpoint MB", each / 1e6, _bytes_below(checkpoints[-1]) / 1e6
    memory = [row[MEMORY] for row in read_standing(frozen.work) if MEMORY in row]
    if memory and said.memory_bytes:
        yield "memory MB", said.memory_bytes / 1e6, max(memory) * 2**20 / 1e6


def _bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
