"""Device and precision for work that trains nothing."""

from lightning_fabric import Fabric

from pipeline.config import TrainerSettings
from pipeline.training.processes import process_environment


def inference_fabric(settings: TrainerSettings) -> Fabric:
    """One device of the configured kind: `fabric.device`, and its precision: `fabric.autocast()`."""
    return Fabric(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision.value,
        plugins=[process_environment(world_size=1)],
    )
