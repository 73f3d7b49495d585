"""Cosines between captions, real pictures and those made from the captions."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import CLIP, JUDGE_CLIP, Embeds, Features, Metric


class Similarity(Metric):
    """Mean cosines in each CLIP; `sample_R@...` says how well pictures find their captions, among `retrieval_pool`."""

    better: ClassVar = {
        f"{clip}{name}": Better.HIGH
        for clip in ("", f"{JUDGE_CLIP}/")
        for name in ("sample_to_caption", "sample_to_real", "sample_R@*")
    }

    def results(self, embeds: Embeds) -> dict[str, float]:
        """Those in the run's own CLIP, then those in the other one."""
        prefixes = {CLIP: "", JUDGE_CLIP: f"{JUDGE_CLIP}/"}
        return {
            f"{prefix}{name}": value
            for encoder, prefix in prefixes.items()
            if encoder in embeds.by_encoder
            for name, value in _cosines(embeds.by_encoder[encoder], embeds.retrieval_pool).items()
        }


def _cosines(found: Features, pool: int) -> dict[str, float]:
    from stages.clip.retrieval import retrieval_hits
    from stages.evaluate.estimate import mean, mean_of_shares

    assert found.text is not None, "a CLIP has captions"
    cosines = {
        "sample_to_caption": found.made * found.text,
        "real_to_caption": found.real * found.text,
        "sample_to_other_caption": found.made * found.text.roll(1, 0),
        "sample_to_real": found.made * found.real,
    }
    estimates = {name: mean(each.sum(1)) for name, each in cosines.items()} | {
        f"sample_{name}": mean_of_shares(hits) for name, hits in retrieval_hits(found.made, found.text, pool).items()
    }
    return {key: value for name, estimate in estimates.items() for key, value in estimate.named(name).items()}


METRIC = Similarity
