"""The stage `evaluate`: settings, what it needs and gives. Imports no torch."""

from typing import Annotated

from pydantic import field_validator

from pipeline.config import ADDED_LATER, RUNTIME, Positive, Settings
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Arity, Better, Input, StageDeclaration, modules_in
from stages.evaluate.metric import Metric

METRICS: dict[str, type[Metric]] = {
    name: module.METRIC for name, module in modules_in("stages.evaluate.metrics").items()
}


class EvaluateSettings(Settings):
    """How good a run is, on held-out pictures and captions.

    `samples` pictures are made from validation captions, and `judged_samples` more from captions of one fully described
    object for each kind of pairs, seen and never seen, where there is a judge. `metrics` are measured on the former.
    """

    retrieval_pool: Positive
    retrieval_samples: Positive
    samples: Positive
    judged_samples: Positive
    grid_captions: Positive
    batch_size: Annotated[Positive, RUNTIME]
    metrics: Annotated[tuple[str, ...], ADDED_LATER] = ("similarity", "prior", "frechet")

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = next((name for name in names if name not in METRICS), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is no metric; there are {', '.join(METRICS)}")
        return names


class EvaluateNumbers(Numbers):
    """How many pictures were made for it."""

    samples: int


EVALUATE = StageDeclaration(
    version=3,
    settings=EvaluateSettings,
    run="stages.evaluate.run:run",
    rehearse="stages.evaluate.run:rehearse",
    output="evaluation",
    inputs=(
        Input("data"),
        Input("clip"),
        Input("prior", Arity.OPTIONAL),
        Input("decoder"),
        Input("upsampler", Arity.ANY),
        Input("judge", Arity.OPTIONAL),
        Input("judge_clip", Arity.OPTIONAL),
    ),
    numbers=EvaluateNumbers,
    better={
        **{f"{pairs}/{size}/*": Better.HIGH for pairs in ("seen", "unseen") for size in ("base", "final")},
        **{name: better for metric in METRICS.values() for name, better in metric.better.items()},
        "clip/R@*": Better.HIGH,
        "upsampler/psnr_db": Better.HIGH,
    },
)
