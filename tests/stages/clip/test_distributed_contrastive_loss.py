"""What the ranks' losses come to together is the loss of the global batch, for every way the ring is cut."""

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

from stages.clip.network import contrastive_loss
from stages.clip.settings import ContrastiveLoss

# From three ranks on, SigLIP's columns travel both ways round the ring; of four, one exchange is left over for one way.
WORLD_SIZES = (2, 3, 4)
PER_RANK, WIDTH = 3, 8


def leaves(kind: ContrastiveLoss, world_size: int) -> dict[str, Tensor]:
    """Everything that has a gradient; the embeddings are those of the global batch."""
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, world_size * PER_RANK, WIDTH, generator=generator)
    made = {"image": image, "text": text, "scale": torch.tensor([10.0])}
    if kind is ContrastiveLoss.SIGLIP:
        made["bias"] = torch.tensor([-4.0])
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def loss_and_gradients(kind: ContrastiveLoss, rows: slice, rank: int, ranks: int, of: int) -> dict[str, Tensor]:
    """Of a rank's rows of the global batch that `of` ranks share."""
    made = leaves(kind, of)
    loss = contrastive_loss(kind, rank, ranks)
    value = loss(made["image"][rows], made["text"][rows], made["scale"], made.get("bias"))
    value.backward()
    gradients = {name: tensor.grad for name, tensor in made.items() if tensor.grad is not None}
    assert gradients.keys() == made.keys()
    return {"loss": value.detach(), **gradients}


def run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        store = f"file://{directory}/store-{world_size}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        for kind in ContrastiveLoss:
            rows = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
            results = loss_and_gradients(kind, rows, rank, world_size, of=world_size)
            torch.save(results, Path(directory) / f"{kind.value}-{rank}-of-{world_size}.pt")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    # Of a process that has imported what each of them would.
    get_context("forkserver").set_forkserver_preload(["stages.clip.network"])
    multiprocessing.start_processes(
        run_rank, args=(str(directory),), nprocs=max(WORLD_SIZES), start_method="forkserver"
    )
    return directory


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("kind", list(ContrastiveLoss))
def test_averaged_over_ranks_loss_and_gradients_are_those_of_the_global_batch(
    results_directory: Path, kind: ContrastiveLoss, world_size: int
):
    whole = loss_and_gradients(kind, slice(None), rank=0, ranks=1, of=world_size)

    ranks = [
        torch.load(results_directory / f"{kind.value}-{rank}-of-{world_size}.pt", weights_only=True)
        for rank in range(world_size)
    ]

    for name, expected in whole.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(0)
        assert expected.abs().max() > 0, f"the {name} would be compared with nothing"
        torch.testing.assert_close(mean, expected, msg=lambda said, name=name: f"{name}: {said}")
