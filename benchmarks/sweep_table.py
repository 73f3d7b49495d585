"""The members of sweeps by their overrides, averaged over seeds, as a Markdown table.

    python benchmarks/sweep_table.py SWEEP --metric NAME=HEADING --outputs DIR

The figures are those of the artifacts of `evaluate`; the cost is the time of the stage `decoder`.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.runs import read_run, run_artifacts, run_names

METRICS = (
    "seen/base/mean=seen pairs",
    "unseen/base/mean=unseen pairs",
    "seen/base/all_right=seen, all right",
    "unseen/base/all_right=unseen, all right",
    "judge_clip/sample_to_caption=sim(sample, caption), other CLIP",
    "sample_to_caption=the same, own CLIP",
    "judge_clip/frechet=Fréchet, other CLIP",
)
NOT_A_SETTING = ("seed=", "run.name=")


def main() -> None:
    """Read the sweep's runs and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sweeps", nargs="+", metavar="sweep")
    parser.add_argument("--metric", action="append", help="NAME=HEADING, once for each column")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    columns = dict(each.split("=", 1) for each in options.metric or METRICS)
    groups = _members(options.outputs, options.sweeps)
    print(f"| setting | runs | {' | '.join(columns.values())} | decoder, s |")
    print(f"|---|---|{'---|' * (len(columns) + 1)}")
    for setting in sorted(groups):
        members = groups[setting]
        cells = [_spread([each["evaluate"].manifest.metrics[name] for each in members]) for name in columns]
        seconds = mean(each["decoder"].manifest.duration_s for each in members)
        print(f"| {setting} | {len(members)} | {' | '.join(cells)} | {seconds:.0f} |")


def _members(outputs: Path, sweeps: Sequence[str]) -> dict[str, list[dict[str, Artifact]]]:
    """The finished members' artifacts, by their overrides without the seed and without what all have in common."""
    found: dict[str, tuple[list[str], dict[str, Artifact]]] = {}  # by fingerprint: two sweeps may share a member
    for name in run_names(outputs):
        record = read_run(outputs, name)
        artifacts = run_artifacts(outputs, record)
        if record.group in sweeps and "evaluate" in artifacts:
            found[artifacts["evaluate"].manifest.fingerprint] = record.overrides, artifacts
    common = set.intersection(*(set(overrides) for overrides, _ in found.values())) if found else set()
    groups: dict[str, list[dict[str, Artifact]]] = defaultdict(list)
    for overrides, artifacts in found.values():
        own = [each for each in overrides if each not in common and not each.startswith(NOT_A_SETTING)]
        groups[", ".join(own)].append(artifacts)
    return groups


def _spread(values: list[float]) -> str:
    around = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{around}"


if __name__ == "__main__":
    main()
