import torch

from stages.embed.embeddings import Whitening

EMBED_DIM = 16


def test_whitened_embeddings_have_zero_mean_and_unit_variance_and_come_back():
    embeds = 3.0 + 2.0 * torch.randn(500, EMBED_DIM)
    whitening = Whitening.of(embeds)

    white = whitening.whiten(embeds)

    torch.testing.assert_close(white.mean(0), torch.zeros(EMBED_DIM), rtol=0, atol=1e-5)
    torch.testing.assert_close(white.std(0, correction=0), torch.ones(EMBED_DIM), rtol=1e-4, atol=0)
    torch.testing.assert_close(whitening.unwhiten(white), embeds, rtol=1e-4, atol=1e-5)


def test_a_constant_dimension_whitens_to_zero():
    embeds = torch.randn(10, 3)
    embeds[:, 1] = 4.0

    assert (Whitening.of(embeds).whiten(embeds)[:, 1] == 0).all()
