"""What `unclip evaluate` measures of one run, with its networks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.data.dataset import CaptionedImages
from pipeline.data.prepared import write_prepared
from pipeline.training.inference import inference_fabric
from stages.clip.network import load_clip
from stages.evaluate.evaluation import Evaluation, Subject, measured_size
from stages.evaluate.request import ATTRIBUTES, RETRIEVAL, UPSAMPLING, ZERO_SHOT, Request
from stages.evaluate.sweep import swept_options
from stages.generation.options import OWN_SAMPLERS, GenerationOptions
from stages.generation.text_to_image import chain_of_inputs, inputs_by_kind
from stages.judge.network import load_judge
from stages.prepare.sources.webdataset import WebDatasetSettings, take_in

OnActivity = Callable[[str], None]


@contextmanager
def held_out(shards: WebDatasetSettings | None) -> Iterator[Path]:
    """Where a data artifact of the given shards is; an empty directory without any."""
    with TemporaryDirectory() as directory:
        if shards is not None:
            taken = take_in(shards)
            write_prepared(
                Path(directory), index=taken.index, splits=taken.splits, captions=taken.captions, mixture=taken.mixture
            )
        yield Path(directory)


@torch.no_grad()
def measure(request: Request, data: Path, on_activity: OnActivity) -> dict[str, dict[str, float]]:
    """The metrics at each value that is swept, or under ""."""
    on_activity("loading")
    fabric = inference_fabric(request.trainer)
    subject = _load(request, fabric.device)
    size = measured_size(subject.chain) if subject.chain else subject.clip.settings.image_size
    images = CaptionedImages(data, size, 0, request.place)
    evaluation = Evaluation(
        subject, images, request.settings, request.trainer.loader_workers,
        lambda made, to_make, activity: on_activity(f"{activity}, {made} of {to_make} pictures"),
    )  # fmt: skip
    with fabric.autocast():
        if request.sweep is None:
            return {"": _metrics(request, evaluation, OWN_SAMPLERS)}
        return {
            f"{request.sweep.name}={value}": _metrics(request, evaluation, swept_options(request.sweep, value))
            for value in request.sweep.values
        }


def _load(request: Request, device: torch.device) -> Subject:
    clip, judge, judge_clip = (request.of_kind(kind) for kind in ("clip", "judge", "judge_clip"))
    chain = chain_of_inputs(inputs_by_kind(request.artifacts), device) if request.makes_pictures else None
    assert clip is not None, "a request is of a run with a CLIP"
    return Subject(
        chain.clip if chain else load_clip(clip, device=device),
        chain,
        load_judge(judge, device) if judge and ATTRIBUTES in request.sections else None,
        load_clip(judge_clip, device=device) if judge_clip else None,
    )


def _metrics(request: Request, evaluation: Evaluation, options: GenerationOptions) -> dict[str, float]:
    measures: Mapping[str, Callable[[], Mapping[str, float]]] = {
        ATTRIBUTES: lambda: evaluation.attributes(options).metrics(),
        RETRIEVAL: evaluation.retrieval,
        ZERO_SHOT: evaluation.zero_shot,
        UPSAMPLING: lambda: evaluation.upsampling(options),
    }
    metrics = evaluation.samples(options).metrics if request.settings.metrics else {}
    for section, measure in measures.items():
        if section in request.sections:
            metrics |= measure()
    return metrics
