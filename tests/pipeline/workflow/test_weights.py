from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.workflow.weights import require_fit, weight_shapes

WEIGHTS = {"one": torch.zeros(2, 3).half(), "other": torch.zeros(()), "third": nn.Parameter(torch.zeros(4).bfloat16())}
SHAPES = {"one": (2, 3), "other": (), "third": (4,)}


def save_in_safetensors(path: Path) -> None:
    save_file({name: each.detach() for name, each in WEIGHTS.items()}, path)


def save_as_a_training_does(path: Path) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    torch.save({"epoch": 3, "name": "run", "state_dict": WEIGHTS, "optimizer": optimizer.state_dict()}, path)


def save_in_the_old_form(path: Path) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)


FORMS: list[tuple[str, Callable[[Path], None]]] = [
    ("weights.safetensors", save_in_safetensors),
    ("weights.pt", lambda path: torch.save(WEIGHTS, path)),
    ("weights.bin", save_as_a_training_does),
    ("weights.pth", save_in_the_old_form),
]


@pytest.mark.parametrize(("file", "save"), FORMS)
def test_names_and_shapes_are_read_from_the_header_of_every_form(
    file: str, save: Callable[[Path], None], tmp_path: Path
):
    save(tmp_path / file)
    assert weight_shapes(tmp_path / file) == SHAPES


@pytest.mark.parametrize(("file", "save"), FORMS[:2])
def test_a_file_that_ends_too_early_is_refused(file: str, save: Callable[[Path], None], tmp_path: Path):
    save(tmp_path / file)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is no file of plain weights, or not whole \(.*\); save the model's") as error:
        weight_shapes(tmp_path / file)
    assert "\n" not in str(error.value)


class RunsCode:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": RunsCode()}, r"\(UnpicklingError: it names \S+print\)"),
        ({"one": 3}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused_and_no_code_in_it_is_run(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        weight_shapes(tmp_path / "weights.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4", b"\x80\x02."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_something_else_is_refused(content: bytes, suffix: str, tmp_path: Path):
    file = (tmp_path / "other").with_suffix(suffix)
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no file of plain weights"):
        weight_shapes(file)
    with pytest.raises(UserError, match=r"cannot be read \(.*\); give a file that is whole"):
        weight_shapes(tmp_path / f"none{suffix}")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (SHAPES | {"one": (2, 4)}, r"^here does not fit: one has shape \[2, 4\] there and \[2, 3\] here \(2 of 3 "),
        ({"one": (2, 3), "other": ()}, r"^here does not fit: it lacks third \(2 of 3 weights fit\); do this$"),
        (SHAPES | {"fourth": ()}, r"^here does not fit: it has fourth in excess \(3 of 3 weights fit\); do this$"),
    ],
)
def test_what_does_not_fit_is_named_and_what_fits_is_counted(found: dict[str, tuple[int, ...]], message: str):
    require_fit(SHAPES, SHAPES | {"other": (1, 1)}, "here", "do this")
    require_fit(SHAPES | {"more": ()}, SHAPES | {"else": ()}, "here", "do this", may_lack=["more"], may_exceed=["else"])
    with pytest.raises(UserError, match=message):
        require_fit(SHAPES, found, "here", "do this")
