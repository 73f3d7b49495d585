"""Kernel Inception distance (arXiv 1801.01401), not in thousandths."""

from stages.evaluate.metric import INCEPTION, distance_of

METRIC = distance_of("kid", INCEPTION, "stages.evaluate.distances:kernel_distance")
