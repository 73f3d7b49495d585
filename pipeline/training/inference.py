"""Device and precision for work that trains nothing."""

from lightning_fabric import Fabric

from pipeline.config import TrainerSettings


def inference_fabric(settings: TrainerSettings) -> Fabric:
    """One device of the configured kind: `fabric.device`, and its precision: `fabric.autocast()`."""
    return Fabric(accelerator=settings.accelerator, devices=1, precision=settings.precision.value)
