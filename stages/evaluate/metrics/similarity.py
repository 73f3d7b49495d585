"""Cosines between captions, real pictures and those made from the captions."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import Embeds, InClip, Metric


class Similarity(Metric):
    """Mean cosines in each CLIP; `sample_R@...` says how well pictures find their captions, among `retrieval_pool`."""

    better: ClassVar = {
        f"{clip}{name}": Better.HIGH
        for clip in ("", "judge_clip/")
        for name in ("sample_to_caption", "sample_to_real", "sample_R@*")
    }

    def results(self, embeds: Embeds) -> dict[str, float]:
        """Those in the run's own CLIP, then those in the other one."""
        return {
            f"{clip}{name}": value
            for clip, found in embeds.in_clip.items()
            for name, value in _cosines(found, embeds.retrieval_pool).items()
        }


def _cosines(found: InClip, pool: int) -> dict[str, float]:
    from stages.clip.retrieval import retrieval_recall

    return {
        "sample_to_caption": float((found.made * found.text).sum(1).mean()),
        "real_to_caption": float((found.real * found.text).sum(1).mean()),
        "sample_to_other_caption": float((found.made * found.text.roll(1, 0)).sum(1).mean()),
        "sample_to_real": float((found.made * found.real).sum(1).mean()),
        **{f"sample_{name}": value for name, value in retrieval_recall(found.made, found.text, pool).items()},
    }


METRIC = Similarity
