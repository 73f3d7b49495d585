"""What a forecast takes from data that are prepared."""

import time

import numpy as np

from pipeline.data.dataset import CaptionedImages, SampleRequest
from pipeline.data.place import ShardPlace
from pipeline.forecast.rehearsal import ExpectedData
from pipeline.workflow.artifacts import Artifact

_TRIED, _CAPTIONS = 64, 1024


def known_of(artifact: Artifact, place: ShardPlace | None) -> ExpectedData:
    """Number, captions and reading speed of the samples of a data artifact.

    Raises:
        UserError: the shards are not where `place` says.
    """
    images = CaptionedImages(artifact.path, image_size=1, place=place)

    def spread(count: int) -> list[int]:
        return np.unique(np.linspace(0, len(images) - 1, count).astype(np.int64)).tolist()

    def decode_s(size: int) -> float:
        resized = CaptionedImages(artifact.path, size, place=place)
        rows = spread(_TRIED)
        started = time.process_time()
        resized.__getitems__([SampleRequest(row, row) for row in rows])
        return (time.process_time() - started) / len(rows)

    return ExpectedData(
        samples=len(images),
        samples_per_shard=len(images) / len(images.data.index.shards),
        artifact_bytes=sum(file.size for file in artifact.manifest.files),
        captions=tuple(images.data.caption(row) for row in spread(_CAPTIONS)),
        decode_s=decode_s,
    )
