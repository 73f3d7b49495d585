"""The stage `export`."""

from pipeline.training.context import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    return StageResult()
