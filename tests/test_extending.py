"""What docs/extending.md says of adding a stage, a network, a metric and a source, done in a copy of this project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

STAGE = {
    "stages/palette/settings.py": '''
"""The stage `palette`: settings, what it needs and gives."""

from pipeline.config import Positive, Settings
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Numbers
from pipeline.workflow.declaration import Input, StageDeclaration, Workflow


class PaletteSettings(Settings):
    """The mean colour of the first `pictures` pictures."""

    pictures: Positive


class PaletteNumbers(Numbers):
    """The mean of red, green and blue, in [0, 255]."""

    mean: tuple[float, float, float]


def check(path: str, settings: PaletteSettings, _workflow: Workflow) -> None:
    """Raise `UserError` for more pictures than anyone looks at."""
    if settings.pictures > 1000:
        raise UserError(f"{path}.pictures {settings.pictures} is above 1000; use less")


PALETTE = StageDeclaration(
    version=1, settings=PaletteSettings, run="stages.palette.run:run", output="palette", inputs=(Input("data"),),
    numbers=PaletteNumbers, check=check,
)
''',
    "stages/palette/run.py": '''
"""The stage `palette`: looks at pictures."""

from pipeline.data.loader import evaluation_loader
from pipeline.data.splits import Split
from pipeline.training.context import StageContext, StageResult
from stages.palette.settings import PaletteNumbers, PaletteSettings


def run(context: StageContext) -> StageResult:
    """Look at the first pictures."""
    pictures = context.settings_as(PaletteSettings).pictures
    images = context.images(16)
    batch = next(iter(evaluation_loader(images, split=Split.TRAIN, batch_size=pictures, limit=pictures)))
    red, green, blue = batch.image.float().mean((0, 2, 3)).tolist()
    return StageResult(PaletteNumbers(mean=(red, green, blue)), {"red": red}, len(batch))
''',
    "stages/catalog.py": (
        "CATALOG = Catalog(\n    {\n",
        'from stages.palette.settings import PALETTE\n\nCATALOG = Catalog(\n    {\n        "palette": PALETTE,\n',
    ),
    "conf/stage/palette.yaml": "kind: palette\npictures: 8\n",
    "conf/workflow/palette.yaml": """
# @package _global_
defaults:
  - /stage@stage.prepare: prepare
  - /stage@stage.palette: palette
""",
}

NETWORK = {
    "stages/decoder/networks/plain.py": '''
"""A decoder of two convolutions."""

from typing import TYPE_CHECKING, Literal

from pipeline.config import Positive, Settings
from stages.decoder.choice import DecoderNetwork

if TYPE_CHECKING:
    from stages.decoder.network import Decoder


class PlainSettings(Settings):
    """`width` channels."""

    kind: Literal["plain"]
    width: Positive


def build(network: PlainSettings, image_size: int, embed_dim: int) -> "Decoder":
    """A network with new weights."""
    import torch
    from torch import nn

    from stages.decoder.network import Decoder

    class Plain(Decoder):
        def __init__(self) -> None:
            super().__init__(embed_dim)
            self.first = nn.Conv2d(3, network.width, 3, padding=1)
            self.embed = nn.Linear(2 * embed_dim + 1, network.width)
            self.last = nn.Conv2d(network.width, 3, 3, padding=1)

        def forward(self, noisy, timestep, condition):
            image_embed = self.image_decorrelation(condition.image_embed)
            if condition.drop_image_embed is not None:
                image_embed = torch.where(condition.drop_image_embed[:, None], 0, image_embed)
            text_embed = self.text_decorrelation(condition.text.embed)
            of_all = self.embed(torch.cat([image_embed, text_embed, timestep[:, None] / 1000], dim=1))
            return self.last(torch.relu(self.first(noisy) + of_all[:, :, None, None]))

    return Plain()


NETWORK = DecoderNetwork(PlainSettings, build)
''',
    "conf/experiment/plain.yaml": """
# @package _global_
# unclip run experiment=plain
defaults:
  - smoke
  - override /model/unet@stage.decoder.network: null
stage:
  decoder:
    network: {kind: plain, width: 8}
""",
}

METRIC = {
    "stages/evaluate/metrics/brightness.py": '''
"""How bright pictures are."""

from typing import ClassVar

from pipeline.workflow.declaration import Better
from stages.evaluate.metric import Embeds, Made, Metric


class Brightness(Metric):
    """The mean of all pixels, made and real, in [-1, 1]."""

    better: ClassVar = {"brightness": Better.HIGH}

    def __init__(self) -> None:
        self._of_batches: list[tuple[float, float]] = []

    def add(self, made: Made) -> None:
        """Take in a batch."""
        self._of_batches.append((float(made.final.mean()), float(made.real.mean())))

    def results(self, embeds: Embeds) -> dict[str, float]:
        """The means of the batches' means."""
        made, real = (sum(each) / len(each) for each in zip(*self._of_batches, strict=True))
        return {"brightness": made, "brightness_of_real": real}


METRIC = Brightness
''',
    "conf/stage/evaluate.yaml": ("metrics: [similarity,", "metrics: [brightness, similarity,"),
}

SOURCE = {
    "stages/prepare/sources/greys.py": '''
"""Grey squares."""

import io
from collections.abc import Iterator
from typing import Literal

from PIL import Image

from pipeline.config import Positive
from pipeline.data.splits import Split
from pipeline.data.write import SourceSample
from stages.prepare.source import MadeSourceSettings, Source, split_of_sample


class GreysSettings(MadeSourceSettings):
    """`samples` squares, from black upwards."""

    source: Literal["greys"]
    samples: Positive


def pieces(settings: GreysSettings) -> range:
    """Their numbers."""
    return range(settings.samples)


def make(settings: GreysSettings, number: int) -> Iterator[tuple[SourceSample, Split]]:
    """Draw a square."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256,) * 3).save(content, "PNG")
    sample = SourceSample(f"grey-{number}", content.getvalue(), "png", f"grey {number}", {"grey": number})
    yield sample, split_of_sample(sample, settings)


SOURCE = Source(GreysSettings, "Nobody has rights in grey.", "cc0-1.0", pieces=pieces, make=make)
''',
    "conf/data/greys.yaml": """
source: greys
samples: 40
split_key: key
validation_fraction: 0.2
shard_samples: 16
""",
}

PROGRAM = """
import json, sys
from pathlib import Path
import stages
from tests.support.tiny_runs import TINY, run_until

outputs = Path(sys.argv[1])
palette = run_until(outputs, "palette", "workflow=palette", base=["tracking=none", "data.samples=40"])
greys = run_until(outputs, "prepare", "data=greys", base=["tracking=none"])
tiny = [each for each in TINY if not each.startswith(("stage.decoder.network", "experiment="))]
plain = [run_until(outputs, stage, base=["experiment=plain", *tiny]) for stage in ("decoder", "evaluate", "export")]
made = {"palette": palette, "greys": greys} | dict(zip(("decoder", "evaluate", "export"), plain))
found = {name: {"path": str(each.path), **each.manifest.model_dump(mode="json")} for name, each in made.items()}
Path(sys.argv[2]).write_text(json.dumps({"where": stages.__path__[0], "made": found}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project with all four things added to it."""
    place = tmp_path_factory.mktemp("checkout")
    for folder in ("pipeline", "stages", "conf", "slurm"):
        shutil.copytree(ROOT / folder, place / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for addition in (STAGE, NETWORK, METRIC, SOURCE):
        for name, content in addition.items():
            file = place / name
            if isinstance(content, str):
                assert not file.exists(), f"{name} is no new file"
                file.parent.mkdir(exist_ok=True)
                file.write_text(content.lstrip())
            else:
                before, after = content
                assert file.read_text().count(before) == 1
                file.write_text(file.read_text().replace(before, after))
    return place


@pytest.fixture(scope="module")
def made(checkout: Path) -> dict[str, dict[str, Any]]:
    """The manifests of what the project makes that has the additions, by name, and where these artifacts are."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT)])}
    report = checkout / "made.json"
    command = [sys.executable, "-c", PROGRAM, str(checkout / "outputs"), str(report)]
    done = subprocess.run(command, env=environment, cwd=checkout, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["where"] == str(checkout / "stages")
    return found["made"]


def test_a_stage_is_five_files(made: dict[str, dict[str, Any]]):
    assert len(STAGE) <= 5
    palette = made["palette"]
    assert palette["kind"] == "palette"
    assert len(palette["numbers"]["mean"]) == 3
    assert palette["metrics"]["red"] == palette["numbers"]["mean"][0]


def test_a_network_of_the_decoder_is_two_files(made: dict[str, dict[str, Any]]):
    assert len(NETWORK) <= 2
    decoder = made["decoder"]
    assert decoder["config"]["network"] == {"kind": "plain", "width": 8}
    assert decoder["samples_seen"] == 16
    assert decoder["metrics"]["diffusion"] > 0


def test_a_metric_is_two_files(made: dict[str, dict[str, Any]]):
    assert len(METRIC) <= 2
    metrics = made["evaluate"]["metrics"]
    assert -1 <= metrics["brightness"] <= 1
    assert metrics["brightness_of_real"] != metrics["brightness"]
    assert "sample_to_caption" in metrics


def test_a_network_that_the_stock_pipeline_cannot_hold_is_exported_as_its_weights(made: dict[str, dict[str, Any]]):
    export = made["export"]
    assert not export["numbers"]["stock_pipeline"]
    assert "U-Net" in export["numbers"]["not_stock_because"]
    assert (Path(export["path"]) / "decoder" / "weights.safetensors").is_file()


def test_a_source_is_two_files(made: dict[str, dict[str, Any]]):
    assert len(SOURCE) <= 2
    data = made["greys"]
    assert data["numbers"]["samples"]["train"] + data["numbers"]["samples"]["validation"] == 40
    assert data["numbers"]["licence_id"] == "cc0-1.0"
