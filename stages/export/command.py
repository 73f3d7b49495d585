"""`unclip export RUN DIR --format ...`: a run's networks as a directory that others' loaders read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.options import OptionParser, command_parser
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.runs import RunRecord, finished_artifacts, read_run
from stages.clip.settings import ClipNetwork, OpenClipNetworkSettings, clip_network
from stages.decoder.settings import DecoderSettings
from stages.export.destination import written_whole
from stages.export.obstacle import obstacle
from stages.export.settings import Dtype, ExportFormat
from stages.generation.options import KINDS
from stages.prior.settings import PriorSettings
from stages.upsampler.settings import UpsamplerSettings


def main(arguments: Sequence[str]) -> int:
    """Parse, refuse what cannot be exported before anything is loaded, write."""
    options = _parser().parse_args(arguments)
    record = read_run(options.outputs, options.run)
    kind = ExportFormat(options.format)
    artifacts = finished_artifacts(options.outputs, record, _taken_by(kind), "export")
    sources = _sources(record, artifacts, kind)
    with written_whole(options.directory, overwrite=options.overwrite) as directory:
        sources = [each.opened() for each in sources]
        from stages.export.write import write_export

        write_export(directory, record.name, kind, Dtype(options.dtype), sources, list(artifacts.values()))
    print(f"{options.directory} holds run {record.name} for {kind.value} in {options.dtype}; its README.md says more")
    return 0


def _parser() -> OptionParser:
    parser = command_parser("export", "A run's networks as a directory that others' loaders read.")
    parser.add_argument("run", help="name of a finished run")
    parser.add_argument("directory", type=Path, help="where to write: a new or an empty directory")
    parser.add_argument(
        "--format", required=True, choices=[each.value for each in ExportFormat],
        help="diffusers: the whole run for its stock unCLIP pipelines; the others: the run's CLIP",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default=Dtype.FP32.value, choices=[each.value for each in Dtype], help="of the weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export that is there")
    return parser


def _taken_by(kind: ExportFormat) -> Sequence[str]:
    return KINDS if kind is ExportFormat.DIFFUSERS else ("clip",)


def _sources(record: RunRecord, artifacts: Mapping[str, Artifact], kind: ExportFormat) -> list[Artifact]:
    """The artifacts that the format takes. Raises `UserError` where one is missing, or one does not fit the format."""
    kinds = _taken_by(kind)
    found = [each for each in artifacts.values() if each.manifest.kind in kinds]
    missing = {"clip", "decoder"} & set(kinds) - {each.manifest.kind for each in found}
    if missing:
        others = "export a run that has one" if "clip" in missing else "--format open_clip and transformers need none"
        raise UserError(
            f"run {record.name} has no {' and no '.join(sorted(missing))}, which {kind.value} needs; {others}"
        )
    if kind is ExportFormat.DIFFUSERS:
        _require_stock(record, found)
    if kind is ExportFormat.TRANSFORMERS and isinstance(_towers(found[0]), OpenClipNetworkSettings):
        raise UserError(
            f"transformers' CLIPModel is a ViT and a causal text transformer, and the CLIP of run {record.name} has "
            "other towers; use --format open_clip"
        )
    return found


def _towers(clip: Artifact) -> ClipNetwork:
    return clip_network(clip.manifest.config["network"])


def _require_stock(record: RunRecord, found: Sequence[Artifact]) -> None:
    by_kind = {name: [each for each in found if each.manifest.kind == name] for name in KINDS}
    in_the_way = obstacle(
        next((each.settings(PriorSettings) for each in by_kind["prior"]), None),
        by_kind["decoder"][0].settings(DecoderSettings),
        [each.settings(UpsamplerSettings) for each in by_kind["upsampler"]],
        _towers(by_kind["clip"][0]),
    )
    if in_the_way is not None:
        raise UserError(
            f"diffusers' stock UnCLIPPipeline cannot hold run {record.name}: {in_the_way}; --format open_clip or "
            "transformers exports its CLIP, and the stage export has each network in diffusers' format"
        )
