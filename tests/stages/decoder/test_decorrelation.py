import torch

from stages.decoder.decorrelation import Decorrelation


def correlated(samples: int = 4000) -> torch.Tensor:
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    return 2.0 + torch.randn(samples, 8) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.3]) @ rotation


def test_it_is_the_identity_before_it_was_fitted():
    embeds = correlated(16)
    torch.testing.assert_close(Decorrelation(8)(embeds), embeds)


def test_fitted_embeddings_have_no_mean_and_half_the_spread_of_variances_at_the_same_mean():
    embeds = correlated()
    decorrelation = Decorrelation(8)
    decorrelation.fit(embeds)
    result = decorrelation(embeds).double()
    torch.testing.assert_close(result.mean(0), torch.zeros(8).double(), atol=1e-3, rtol=0)
    before, after = torch.linalg.eigvalsh(torch.cov(embeds.double().T)), torch.linalg.eigvalsh(torch.cov(result.T))
    # The standard deviations' logarithms are halved (the smallest direction is at the floor's edge, 0.3^2 / 5^2).
    torch.testing.assert_close((after / after[-1]).log(), (before / before[-1]).log() / 2, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(after.mean(), before.mean())


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
