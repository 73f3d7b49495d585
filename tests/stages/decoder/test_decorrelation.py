import pytest
import torch

from stages.decoder.decorrelation import MIN_EIGENVALUE_SHARE, Decorrelation


def correlated(samples: int = 4000) -> torch.Tensor:
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    return 2.0 + torch.randn(samples, 8) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3]) @ rotation


def test_it_is_the_identity_before_it_was_fitted():
    embeds = correlated(16)
    torch.testing.assert_close(Decorrelation(8)(embeds), embeds)


def test_fitted_embeddings_have_no_mean_and_all_the_variance_that_their_directions_have_on_average():
    embeds = correlated()
    decorrelation = Decorrelation(8)
    decorrelation.fit(embeds)
    result = decorrelation(embeds).double()
    torch.testing.assert_close(result.mean(0), torch.zeros(8).double(), atol=1e-3, rtol=0)
    average = torch.linalg.eigvalsh(torch.cov(embeds.double().T)).mean()
    torch.testing.assert_close(torch.cov(result.T), average * torch.eye(8).double(), atol=1e-2, rtol=1e-3)


def test_a_direction_of_next_to_no_variance_is_amplified_as_if_it_had_the_least_share():
    embeds = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 0.01])
    decorrelation = Decorrelation(2)
    decorrelation.fit(embeds)
    ratio = decorrelation.matrix[1, 1] / decorrelation.matrix[0, 0]
    assert ratio.item() == pytest.approx(MIN_EIGENVALUE_SHARE**-0.5, rel=1e-3)


def test_the_inverse_gives_the_embeddings_back():
    embeds = correlated()
    decorrelation = Decorrelation(8)
    decorrelation.fit(embeds)
    torch.testing.assert_close(decorrelation.inverse(decorrelation(embeds)), embeds, atol=1e-3, rtol=1e-3)


def test_a_layer_with_it_folded_in_agrees_on_plain_embeddings():
    embeds = correlated()
    decorrelation = Decorrelation(8)
    decorrelation.fit(embeds)
    linear = torch.nn.Linear(8, 3)
    torch.testing.assert_close(
        decorrelation.folded_into(linear)(embeds), linear(decorrelation(embeds)), atol=1e-4, rtol=1e-4
    )
