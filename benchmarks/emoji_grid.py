"""Pictures of an emoji run from names that it trained on, one in each language, beside the real ones.

    python benchmarks/emoji_grid.py RUN docs/emoji.png

Language n has the n-th picture whose name in it is in the training split: nothing is chosen by its looks. Names in
other scripts need fonts (Debian: fonts-noto-core, fonts-noto-cjk).
"""

import argparse
import io
from pathlib import Path

import emoji
import torch
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.dataset import CaptionedImages
from pipeline.data.mixing import named_seed
from pipeline.data.splits import Split
from pipeline.workflow.runs import read_run, run_artifacts
from stages.generation.grid import to_pil
from stages.generation.options import GenerationOptions
from stages.generation.text_to_image import chain_of_inputs, inputs_by_kind

COLUMNS, CELL, TEXT = 7, 112, 18
FONTS = {
    "ar": "NotoSansArabic-Regular.ttf",
    "fa": "NotoSansArabic-Regular.ttf",
    "ja": "NotoSansCJK-Regular.ttc",
    "ko": "NotoSansCJK-Regular.ttc",
    "zh": "NotoSansCJK-Regular.ttc",
}


def main() -> None:
    """Choose the names, sample, draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    artifacts = run_artifacts(options.outputs, read_run(options.outputs, options.run))
    images = CaptionedImages(artifacts["prepare"].path, 64)
    rows = _one_of_each_language(images)
    captions = [images.data.caption(row) for row in rows]
    chain = chain_of_inputs(inputs_by_kind(artifacts.values()), torch.device("cpu"))
    seeds = [named_seed(0, caption) for caption in captions]
    made = chain.generate(captions, seeds, GenerationOptions())
    grid = Image.new("RGB", (COLUMNS * (2 * CELL + 12), 2 * (CELL + TEXT + 12)), "white")
    draw = ImageDraw.Draw(grid)
    for place, (row, caption, picture) in enumerate(zip(rows, captions, made.final, strict=True)):
        left, top = place % COLUMNS * (2 * CELL + 12), place // COLUMNS * (CELL + TEXT + 12)
        real = Image.open(io.BytesIO(images.data.reader.image(row)))
        for offset, each in enumerate((real, to_pil(picture))):
            grid.paste(each.resize((CELL, CELL), Image.Resampling.LANCZOS), (left + offset * CELL, top))
        language = images.data.attributes(row)["language"]
        font = ImageFont.truetype(FONTS.get(language, "NotoSans-Regular.ttf"), 13)
        draw.text((left, top + CELL + 2), caption[:34], fill="black", font=font)
    grid.save(options.picture)


def _one_of_each_language(images: CaptionedImages) -> list[int]:
    """For each language a training row, all of different pictures, in the order of the index."""
    chosen: list[int] = []
    shown: set[str] = set()
    for language in emoji.LANGUAGES:
        for row in images.data.samples_in(Split.TRAIN).tolist():
            attributes = images.data.attributes(row)
            if attributes["language"] == language and attributes["picture"] not in shown:
                chosen.append(row)
                shown.add(attributes["picture"])
                break
    return chosen


if __name__ == "__main__":
    main()
