"""CMMD: the maximum mean discrepancy of CLIP embeddings (arXiv 2401.09603)."""

from stages.evaluate.metric import OPEN_CLIP, distance_of

METRIC = distance_of("cmmd", OPEN_CLIP, "stages.evaluate.distances:rbf_distance")
