"""Real stages on tiny data, run in this process through the engine's entry point."""

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.compose import compose_members
from pipeline.overrides import key_of
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage
from pipeline.workflow.plan import plan_run
from pipeline.workflow.progress import Failure, Outcome, read_failure
from pipeline.workflow.record import METRICS, entries

NARROW_UNET = (
    "{channels: [8, 16], layers_per_block: 1, attention: [false, true], attention_head_dim: 8, norm_groups: 4}"
)

TINY = [
    "experiment=smoke",
    "tracking=none",
    "trainer.accelerator=cpu",
    "trainer.cpu_threads=1",
    "trainer.log_every_steps=1",
    "data.samples=64",
    "data.unseen_samples=4",
    "data.validation_fraction=0.25",
    "stage.clip.network.vision_width=24",
    "stage.clip.network.vision_layers=1",
    "stage.clip.network.vision_heads=2",
    "stage.clip.network.embed_dim=16",
    "stage.clip.network.text_width=16",
    "stage.clip.network.text_layers=1",
    "stage.clip.network.text_heads=2",
    "stage.clip.network.context_length=16",
    "stage.clip.global_batch_size=8",
    "stage.clip.max_samples=16",
    "stage.prior.network={layers: 1, heads: 2, head_dim: 8}",
    "stage.prior.global_batch_size=8",
    "stage.prior.max_samples=16",
    "stage.prior.sampler.steps=2",
    f"stage.decoder.network={NARROW_UNET}",
    "stage.decoder.image_size=16",
    "stage.decoder.global_batch_size=8",
    "stage.decoder.max_samples=16",
    "stage.decoder.sampler.steps=2",
    f"stage.upsampler.network={NARROW_UNET}",
    "stage.upsampler.network.attention=[false,false]",
    "stage.upsampler.global_batch_size=4",
    "stage.upsampler.max_samples=8",
    "stage.upsampler.crop_size=16",
    "stage.upsampler.sampler.steps=2",
    "stage.judge={data: {samples: 40, validation_samples: 8, shard_samples: 24}, width: 4, max_samples: 256}",
    "stage.judge_clip.global_batch_size=8",
    "stage.judge_clip.max_samples=16",
    "stage.evaluate.judged_samples=4",
    "stage.evaluate.samples=6",
    "stage.evaluate.grid_captions=4",
    "stage.evaluate.batch_size=4",
]


def the_last_of_each_key(*overrides: str) -> list[str]:
    """What is left where later overrides take the place of earlier ones: a command line refuses a key given twice."""
    return list({key_of(each) or each: each for each in overrides}.values())


def tiny_without(*stages: str) -> list[str]:
    """The tiny workflow with these stages left out."""
    rest = (each for each in TINY if re.split("[.=]", each)[1] not in stages)
    return [*rest, *(f"~stage.{stage}" for stage in stages)]


def plan_stages(outputs: Path, *overrides: str, base: Sequence[str] = TINY) -> dict[str, FrozenStage]:
    """Every stage of the tiny workflow, or that of `base`, frozen, by name, in an order that can be followed."""
    (member,) = compose_members("unclip plan", the_last_of_each_key(*base, f"paths.outputs={outputs}", *overrides))
    planned = plan_run(member.config, member.overrides).stages
    return {stage.name: stage.frozen for stage in planned if stage.frozen is not None}


def run_until(outputs: Path, target: str, *overrides: str, base: Sequence[str] = TINY) -> Artifact:
    """Run what `target` needs, then `target`, reusing what `outputs` holds already; its artifact."""
    stages = plan_stages(outputs, *overrides, base=base)
    for frozen in needed(stages, target):
        outcome = run_stage_of(frozen)
        assert outcome in (Outcome.FINISHED, Outcome.REUSED), read_failure(frozen.work)
    artifact = stages[target].store.find(target, stages[target].fingerprint)
    assert artifact is not None
    return artifact.opened()


def failure_of(outputs: Path, target: str, *overrides: str) -> Failure:
    """Run what `target` needs, then `target`, which must fail."""
    stages = plan_stages(outputs, *overrides)
    *before, last = needed(stages, target)
    for frozen in before:
        assert run_stage_of(frozen) in (Outcome.FINISHED, Outcome.REUSED), read_failure(frozen.work)
    assert run_stage_of(last) is Outcome.FAILED
    failure = read_failure(last.work)
    assert failure is not None
    return failure


def run_stage_of(frozen: FrozenStage, interruption: threading.Event | None = None) -> Outcome:
    from pipeline.training.stage import run_stage

    return run_stage(frozen, interruption or threading.Event())


def run_and_stop(frozen: FrozenStage, *, when: Callable[[], bool]) -> Outcome:
    """Run a stage and ask it to stop as soon as `when` says so."""
    stop, is_over = threading.Event(), threading.Event()

    def watch() -> None:
        while not when():
            if is_over.wait(0.001):
                return
        stop.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = run_stage_of(frozen, stop)
    is_over.set()
    watcher.join()
    return outcome


def rows_of(artifact: Artifact) -> list[dict[str, float]]:
    return list(entries((artifact.path / METRICS).read_bytes().splitlines(), artifact.path))


def needed(stages: dict[str, FrozenStage], target: str) -> list[FrozenStage]:
    """What has to be run for `target`, and that itself at the end."""
    wanted = {target}
    for name in reversed(stages):
        if name in wanted:
            wanted |= {reference.stage for found in stages[name].inputs.values() for reference in found}
    return [frozen for name, frozen in stages.items() if name in wanted]
