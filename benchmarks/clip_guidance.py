"""What CLIP guidance does: similarity to the caption, by a CLIP that did not guide, and attribute accuracy, against S.

    python benchmarks/clip_guidance.py RUN --scales 0 30 100 300 --samples 128 --figure docs/clip_guidance.png

The base pictures are judged: the upsampler neither guides nor is guided. Needs a run with both judges.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from pipeline.data.dataset import CaptionedImages
from pipeline.data.loader import rows_loader
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.runs import read_run, run_artifacts
from stages.captions import CaptionEncoder
from stages.clip.network import ClipModel, load_clip
from stages.decoder.network import Condition
from stages.decoder.settings import DecoderOptions
from stages.evaluate.attributes import MEAN, AttributeAccuracy, judged_rows
from stages.evaluate.estimate import Estimate
from stages.generation.text_to_image import TextToImage, chain_of_inputs, inputs_by_kind
from stages.judge.labels import true_labels
from stages.judge.network import load_judge
from stages.weights import CPU

BATCH_SIZE = 64
COLUMNS = ("S", "sim, own CLIP", "sim, other CLIP", "attributes, seen pairs", "attributes, unseen pairs")


@dataclass(frozen=True)
class Row:
    """What pictures of one scale are like; similarities are means over the seen and unseen captions."""

    scale: float
    own_similarity: float
    other_similarity: float
    seen: Estimate
    unseen: Estimate


def main() -> None:
    """Sample at every scale, print the table, draw the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--scales", type=float, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128, help="captions of each kind of pairs")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    artifacts = run_artifacts(options.outputs, read_run(options.outputs, options.run))
    chain = chain_of_inputs(inputs_by_kind(artifacts.values()), CPU)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    rows = []
    for scale in options.scales:
        row = _measure(chain, artifacts, scale, options.samples)
        rows.append(row)
        accuracies = " | ".join(f"{each.value:.3f} ({each.low:.2f}-{each.high:.2f})" for each in (row.seen, row.unseen))
        print(f"| {scale:g} | {row.own_similarity:.3f} | {row.other_similarity:.3f} | {accuracies} |", flush=True)
    if options.figure:
        _draw(rows, options.figure)


@torch.no_grad()
def _measure(chain: TextToImage, artifacts: dict[str, Artifact], scale: float, samples: int) -> Row:
    assert chain.prior is not None, "the figure is of unCLIP"
    images = CaptionedImages(artifacts["prepare"].path, 64)
    judge, judge_clip = load_judge(artifacts["judge"]), load_clip(artifacts["judge_clip"])
    accuracy = AttributeAccuracy()
    own, other = [], []
    for group, rows in judged_rows(images, samples).items():
        for batch in rows_loader(images, [rows], batch_size=BATCH_SIZE):
            draws, text = batch.draws(), chain.captions.encode(batch.caption)
            image_embed = chain.prior.sample(text, draws)
            options = DecoderOptions(clip_guidance_scale=scale)
            made = chain.decoder.sample(Condition(image_embed, text), draws, options)
            own.append(_similarity(chain.clip, made, batch.caption))
            other.append(_similarity(judge_clip, made, batch.caption))
            accuracy.add(group, judge.read(made) == true_labels(images, batch.sample.tolist()))
    estimates = accuracy.estimates()
    similarities = float(torch.cat(own).mean()), float(torch.cat(other).mean())
    return Row(scale, *similarities, estimates["seen"][MEAN], estimates["unseen"][MEAN])


def _similarity(clip: ClipModel, made: torch.Tensor, captions: tuple[str, ...]) -> torch.Tensor:
    return F.cosine_similarity(clip.encode_image(made), CaptionEncoder(clip).encode(captions).embed)


def _draw(rows: list[Row], path: Path) -> None:
    scales = [row.scale for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(scales, [row.own_similarity for row in rows], marker="o", label="the CLIP that guides")
    left.plot(scales, [row.other_similarity for row in rows], marker="o", label="another CLIP")
    left.set_ylabel("sim(picture, caption)")
    for name in ("seen", "unseen"):
        estimates: list[Estimate] = [getattr(row, name) for row in rows]
        (line,) = right.plot(scales, [each.value for each in estimates], marker="o", label=f"{name} pairs")
        low, high = [each.low for each in estimates], [each.high for each in estimates]
        right.fill_between(scales, low, high, color=line.get_color(), alpha=0.15)
    right.set_ylabel("attribute accuracy")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=max(1.0, min(scale for scale in scales if scale > 0)))
        axes.set_xlabel("CLIP guidance scale S")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
