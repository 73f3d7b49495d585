"""Fréchet Inception distance (arXiv 1706.08500)."""

from stages.evaluate.metric import INCEPTION, distance_of

METRIC = distance_of("fid", INCEPTION, "stages.evaluate.distances:frechet_distance")
