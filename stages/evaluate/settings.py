"""The stage `evaluate`: settings, what it needs and gives. Imports no torch."""

from typing import Annotated

from pipeline.config import RUNTIME, Positive, Settings
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Arity, Better, Input, StageDeclaration


class EvaluateSettings(Settings):
    """How good a run is, on held-out pictures and captions.

    `samples` pictures are made from validation captions, and `judged_samples` more from captions of one fully described
    object for each kind of pairs, seen and never seen, where there is a judge.
    """

    retrieval_pool: Positive
    retrieval_samples: Positive
    samples: Positive
    judged_samples: Positive
    grid_captions: Positive
    batch_size: Annotated[Positive, RUNTIME]


class EvaluateNumbers(Numbers):
    """How many pictures were made for it."""

    samples: int


EVALUATE = StageDeclaration(
    version=3,
    settings=EvaluateSettings,
    run="stages.evaluate.run:run",
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
        **{
            f"{clip}{metric}": Better.HIGH
            for clip in ("", "judge_clip/")
            for metric in ("sample_to_caption", "sample_to_real", "sample_R@*")
        },
        "judge_clip/frechet": Better.LOW,
        "prior/to_image": Better.HIGH,
        "clip/R@*": Better.HIGH,
        "upsampler/psnr_db": Better.HIGH,
    },
)
