"""Every class of stages. Imports no torch, so that planning is quick."""

from pipeline.workflow.declaration import Catalog
from stages.clip.settings import CLIP, JUDGE_CLIP
from stages.decoder.settings import DECODER
from stages.embed.settings import EMBED
from stages.evaluate.settings import EVALUATE
from stages.export.settings import EXPORT
from stages.judge.settings import JUDGE
from stages.prepare.settings import PREPARE
from stages.prior.settings import PRIOR
from stages.upsampler.settings import UPSAMPLER

CATALOG = Catalog(
    {
        "prepare": PREPARE,
        "clip": CLIP,
        "embed": EMBED,
        "prior": PRIOR,
        "decoder": DECODER,
        "upsampler": UPSAMPLER,
        "judge": JUDGE,
        "judge_clip": JUDGE_CLIP,
        "evaluate": EVALUATE,
        "export": EXPORT,
    }
)
