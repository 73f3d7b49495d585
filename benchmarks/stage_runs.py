"""What the benchmarks of strategies share: training stages that are run apart from each other, on the same inputs."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.workflow.frozen import FrozenStage  # noqa: E402
from tests.support.ranks import log_of, run_on_ranks  # noqa: E402
from tests.support.tiny import finished  # noqa: E402
from tests.support.tiny_runs import TINY, plan_stages, run_until  # noqa: E402

STAGES = ("clip", "prior", "decoder", "upsampler", "judge")
"""Every kind that trains a network."""

__all__ = ["ROOT", "STAGES", "TINY", "Bench", "finished", "run_or_exit"]


@dataclass(frozen=True)
class Bench:
    """Where each run has outputs of its own, and the settings that all of them have, beside those of `base`."""

    place: Path
    overrides: tuple[str, ...]
    base: tuple[str, ...] = tuple(TINY)

    def make_inputs(self) -> None:
        """Make what the stages read: data, a CLIP and its embeddings."""
        run_until(self.place / "inputs", "embed", *self.overrides, base=self.base)

    def stage(self, name: str, run: str, strategy: str, devices: int = 1) -> FrozenStage:
        """A stage whose inputs are there and which was not begun."""
        artifacts = self.place / name / run / "artifacts"
        artifacts.mkdir(parents=True)
        for made in ("prepare", "clip", "embed"):
            if made != name:
                (artifacts / made).symlink_to(self.place / "inputs" / "artifacts" / made)
        options = [f"trainer={strategy}", f"trainer.devices={devices}"]
        return plan_stages(artifacts.parent, *self.overrides, *options, base=self.base)[name]


def run_or_exit(stages: list[FrozenStage], processes: int) -> None:
    """Run stages one after the other, each on all processes; where one fails, end with their logs."""
    statuses = run_on_ranks(stages, processes=processes, timeout_s=900)
    if any(statuses):
        sys.exit("\n".join(map(log_of, stages)))
