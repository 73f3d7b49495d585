"""Device and precision for work that trains nothing."""

from lightning_fabric import Fabric

from pipeline.config import TrainerSettings
from pipeline.training.hardware import accelerator_of
from pipeline.training.processes import process_environment


def inference_fabric(settings: TrainerSettings) -> Fabric:
    """One device of the configured kind: `fabric.device`, and its precision: `fabric.autocast()`.

    Raises `UserError` where a GPU is asked for and there is none.
    """
    return Fabric(
        accelerator=accelerator_of(settings),
        devices=1,
        precision=settings.precision.of_lightning,
        plugins=[process_environment(world_size=1)],
    )
