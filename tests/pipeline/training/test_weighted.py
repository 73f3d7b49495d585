import pytest
import torch

from pipeline.training.weighted import weighted, weighted_means


def test_of_batches_of_any_size_each_sample_counts_once():
    losses, is_in = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), torch.tensor([1, 0, 0, 0, 1, 1], dtype=torch.bool)
    batches = [(losses[:4], is_in[:4]), (losses[4:], is_in[4:])]
    sums = {"loss": 0.0}
    for loss, chosen in batches:
        found = weighted("late", (loss * chosen).mean(), chosen.float().mean()) | {"loss": loss.mean()}
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(loss)
    means = weighted_means({name: total / len(losses) for name, total in sums.items()})
    assert means == pytest.approx({"loss": 3.5, "late": 4.0})


def test_where_there_was_no_sample_nothing_is_said():
    assert weighted_means({"loss": 1.0, "late": 0.0, "late/weight": 0.0}) == {"loss": 1.0}
