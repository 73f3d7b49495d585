from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from stages.models.clip import contrastive_loss
from stages.settings import ContrastiveLoss

RANKS, PER_RANK, WIDTH = 2, 3, 8


def embeddings():
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, RANKS * PER_RANK, WIDTH, generator=generator)
    return image.requires_grad_(), text.requires_grad_()


def parameters():
    return torch.tensor([10.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)


def run_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    for kind in ContrastiveLoss:
        image, text = embeddings()
        scale, bias = parameters()
        rows = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        loss = contrastive_loss(kind, rank, RANKS)
        value = loss(image[rows], text[rows], scale, bias if kind is ContrastiveLoss.SIGLIP else None)
        value.backward()
        results = {"loss": value.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}
        torch.save(results, Path(directory) / f"{kind.value}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(str(directory),), nprocs=RANKS)
    return directory


@pytest.mark.parametrize("kind", list(ContrastiveLoss))
def test_averaged_over_ranks_loss_and_gradients_are_those_of_the_global_batch(results_directory, kind):
    image, text = embeddings()
    scale, bias = parameters()
    whole = contrastive_loss(kind, 0, 1)(image, text, scale, bias if kind is ContrastiveLoss.SIGLIP else None)
    whole.backward()

    ranks = [torch.load(results_directory / f"{kind.value}-{rank}.pt", weights_only=True) for rank in range(RANKS)]

    mean = {name: sum(rank[name] for rank in ranks) / RANKS for name in ranks[0]}
    torch.testing.assert_close(mean["loss"], whole.detach())
    torch.testing.assert_close(mean["image"], image.grad)
    torch.testing.assert_close(mean["text"], text.grad)
    torch.testing.assert_close(mean["scale"], scale.grad)
