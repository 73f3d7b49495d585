"""What is said of a failed start, and what a job is changed to before it starts again."""

from pathlib import Path

import pytest

from pipeline.compose import compose_members
from pipeline.launch.slurm.aftermath import decide, overrides_to_rebuild, with_remedy
from pipeline.launch.slurm.settings import Policy
from pipeline.workflow.artifacts import MANIFEST, SET_ASIDE
from pipeline.workflow.causes import Cause, End
from pipeline.workflow.damage import DamagedArtifactError
from pipeline.workflow.frozen import write_frozen
from pipeline.workflow.progress import Failure
from tests.support import tiny
from tests.support.tiny_runs import plan_stages

POLICY = Policy(
    times={Cause.OUT_OF_MEMORY: 9}, memory_factor=1.5, time_factor=2, exclude_after=2, mem_mib=800, time_limit_min=9
)


def test_memory_is_raised_to_what_nodes_have_and_then_the_micro_batch_is_halved_until_nothing_is_left(tmp_path: Path):
    path = write_frozen(tiny.frozen(tmp_path)).path
    ends, found = [], []
    for start in range(6):
        end = End("7", start, "a", Cause.OUT_OF_MEMORY)
        found.append(decide(path, POLICY, end, ends, 1500))
        ends.append(end)
    changes, words = zip(*found, strict=True)
    assert changes == (["MinMemoryNode=1200"], ["MinMemoryNode=1500"], [], [], [], None)
    assert words[2] == "starts again (3 of 9) with trainer.micro_batch_size=4"
    assert (
        words[-1]
        == "it does not start again, as no node here gives more than 1500 MiB and there is no micro-batch to halve"
    )
    assert decide(path, POLICY, ends[1], ends, 0)[0] == ["MinMemoryNode=1800"]


@pytest.mark.parametrize("name", ["outputs", "it's = {a}, \\'b"])
def test_of_a_damaged_input_a_command_is_told_that_works_when_typed(tmp_path: Path, name: str):
    place = tmp_path / name
    frozen = plan_stages(tmp_path, "stage.decoder.max_samples=24")["decoder"]
    frozen = frozen.model_copy(update={"run": "s.3", "group": "s", "outputs": place})
    damaged = frozen.store.path(*frozen.needs[0])
    failure = Failure(
        str(DamagedArtifactError("x is cut", "mend it", ": stage clip is set aside")), True, Cause.SETTINGS
    )
    assert with_remedy(failure, frozen) is failure
    damaged.mkdir(parents=True)
    (damaged / SET_ASIDE).touch()
    message = with_remedy(failure, frozen).message
    assert message.startswith("x is cut: stage clip is set aside; this makes it anew, and goes on from there: unclip ")
    (member,) = compose_members("unclip submit", overrides_to_rebuild(frozen), default="launch=slurm")
    config = member.config
    assert (config.run.name, config.run.group, config.paths.outputs) == ("s.3", "s", place)
    assert config.store.on_damage.value == "rebuild"
    assert not (damaged / MANIFEST).exists()
    assert config.stage["decoder"]["max_samples"] == 24
