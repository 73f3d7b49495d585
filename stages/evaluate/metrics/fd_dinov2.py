"""Fréchet distance in DINOv2 (arXiv 2306.04675)."""

from stages.evaluate.metric import DINOV2, distance_of

METRIC = distance_of("fd_dinov2", DINOV2, "stages.evaluate.distances:frechet_distance")
