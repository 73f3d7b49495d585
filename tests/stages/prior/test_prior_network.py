import torch

from stages.clip.network import TextEncoding
from stages.embed.embeddings import Whitening
from stages.prior.network import build_prior, denoise_prior, get_whitening, set_whitening
from stages.prior.settings import PriorNetworkSettings

EMBED_DIM, CONTEXT = 16, 10


def captions(batch):
    mask = torch.arange(CONTEXT)[None] < torch.randint(2, CONTEXT + 1, (batch, 1))
    return TextEncoding(torch.randn(batch, EMBED_DIM), torch.randn(batch, CONTEXT, EMBED_DIM), mask)


def without_gradient(network):
    return [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]


def make_prior():
    torch.manual_seed(0)
    return build_prior(PriorNetworkSettings(layers=2, heads=2, head_dim=8), EMBED_DIM, CONTEXT)


def test_a_prior_step_reaches_every_parameter():
    prior, given = make_prior(), captions(3)
    denoise_prior(
        prior,
        torch.randn(3, EMBED_DIM),
        torch.tensor([1, 2, 3]),
        given,
    ).sum().backward()

    assert without_gradient(prior) == []
    assert not prior.clip_mean.requires_grad


@torch.no_grad()
def test_the_prior_takes_a_timestep_for_each_sample():
    prior, given, noisy = make_prior().eval(), captions(2), torch.randn(2, EMBED_DIM)
    text = given

    together = denoise_prior(prior, noisy, torch.tensor([5, 900]), text)

    for row, timestep in enumerate((5, 900)):
        one = text[row : row + 1]
        alone = prior(noisy[row : row + 1], timestep, one.embed, one.hidden, one.mask).predicted_image_embedding
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_prior_carries_the_whitening_as_the_stock_pipeline_reads_it(tmp_path):
    prior, embeds = make_prior(), 3.0 + 2.0 * torch.randn(50, EMBED_DIM)
    whitening = Whitening.of(embeds)
    set_whitening(prior, whitening)
    prior.save_pretrained(tmp_path)

    again = type(prior).from_pretrained(tmp_path)

    white = torch.randn(4, EMBED_DIM)
    torch.testing.assert_close(again.post_process_latents(white), whitening.unwhiten(white))
    torch.testing.assert_close(get_whitening(again).std, whitening.std)
