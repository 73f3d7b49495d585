"""The members of sweeps by their overrides, averaged over seeds, as a Markdown table.

    python benchmarks/sweep_table.py SWEEP --metric NAME=HEADING --outputs DIR

The figures are those of the artifacts of `evaluate`; the cost is the time of the stage `decoder`.
"""

import argparse
from pathlib import Path

from pipeline.report.records import Comparison, read_comparison
from pipeline.report.sweep import Effect, Level, effects, settings
from pipeline.workflow.runs import read_runs

METRICS = (
    "seen/base/mean=seen pairs",
    "unseen/base/mean=unseen pairs",
    "seen/base/all_right=seen, all right",
    "unseen/base/all_right=unseen, all right",
    "judge_clip/sample_to_caption=sim(sample, caption), other CLIP",
    "sample_to_caption=the same, own CLIP",
    "judge_clip/frechet=Fréchet, other CLIP",
)


def main() -> None:
    """Read the sweep's runs and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sweeps", nargs="+", metavar="sweep")
    parser.add_argument("--metric", action="append", help="NAME=HEADING, once for each column")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    names, headings = zip(*(each.split("=", 1) for each in options.metric or METRICS), strict=True)
    records = [record for sweep in options.sweeps for record in read_runs(options.outputs, sweep)]
    comparison = read_comparison(options.outputs, records)
    costs = _settings(comparison, "decoder.time_s")
    figures = [_settings(comparison, f"evaluate.{name}").levels for name in names]
    print(f"| {costs.parameter} | runs | {' | '.join(headings)} | decoder, s |")
    print(f"|---|---|{'---|' * (len(headings) + 1)}")
    for cost, *levels in zip(costs.levels, *figures, strict=True):
        print(f"| {cost.label} | {levels[0].count} | {' | '.join(map(_spread, levels))} | {cost.mean or 0:.0f} |")


def _settings(comparison: Comparison, metric: str) -> Effect:
    """The members by all that was varied but the seed."""
    alone = (each for each in effects(comparison, metric) if each.parameter != "seed")
    return settings(comparison, metric) or next(alone)


def _spread(level: Level) -> str:
    around = "" if level.deviation is None else f" ± {level.deviation:.3f}"
    return "" if level.mean is None else f"{level.mean:.3f}{around}"


if __name__ == "__main__":
    main()
