import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from pipeline.data.write import SourceSample


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def source_sample(number: int) -> SourceSample:
    image = png((number % 256, number // 256, 77))
    return SourceSample(f"{number:05d}", image, "png", f"picture {number}", {"number": number})
