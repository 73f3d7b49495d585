import pytest
import torch

from stages.diffusion.clip_loss import clip_loss, output_gradient_norms, similarity
from stages.diffusion.settings import ClipLossSettings


class MeanColourClip:
    def __init__(self):
        self.pictures_seen = 0

    def encode_image(self, image):
        self.pictures_seen += len(image)
        return image.mean((2, 3))


def settings(power=1.0, share=1.0):
    return ClipLossSettings(weight=0.1, timestep_power=power, sample_share=share)


def test_the_similarity_is_the_cosine_between_picture_and_caption():
    red = torch.tensor([0.5, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)

    assert similarity(MeanColourClip(), red, torch.tensor([[2.0, 0.0, 0.0]])).item() == pytest.approx(1.0)
    assert similarity(MeanColourClip(), red, torch.tensor([[-3.0, 0.0, 0.0]])).item() == pytest.approx(-1.0)
    assert similarity(MeanColourClip(), red, torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(0.0)


def test_colours_that_no_screen_shows_buy_no_similarity():
    picture = torch.full((1, 3, 4, 4), 2.0, requires_grad=True)
    similarity(MeanColourClip(), picture, torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()

    assert picture.grad is not None
    assert picture.grad.abs().max() == 0.0


def test_the_loss_is_the_negative_similarity_weighted_by_a_power_of_alpha_bar():
    x_0_hat, text_embed = 0.1 * torch.randn(4, 3, 4, 4), torch.randn(4, 3)
    alpha_bar = torch.tensor([1.0, 0.5, 0.25, 0.0])
    cosine = torch.cosine_similarity(x_0_hat.mean((2, 3)), text_embed)

    loss = clip_loss(MeanColourClip(), x_0_hat, text_embed, alpha_bar, torch.zeros(4), settings(power=2.0))

    torch.testing.assert_close(loss, -(alpha_bar**2) * cosine)


def test_a_share_of_the_samples_carries_the_loss_and_makes_up_for_the_rest():
    clip = MeanColourClip()
    x_0_hat, text_embed = 0.1 * torch.randn(4000, 3, 2, 2), torch.ones(4000, 3)
    alpha_bar, draw = torch.rand(4000), torch.rand(4000)
    everything = clip_loss(MeanColourClip(), x_0_hat + 0.05, text_embed, alpha_bar, draw, settings())

    part = clip_loss(clip, x_0_hat + 0.05, text_embed, alpha_bar, draw, settings(share=0.25))

    carrying = draw < 0.25
    assert clip.pictures_seen == int(carrying.sum())
    assert (part[~carrying] == 0).all()
    torch.testing.assert_close(part[carrying], everything[carrying] / 0.25)
    assert part.mean().item() == pytest.approx(everything.mean().item(), rel=0.15)


def test_a_split_batch_has_the_loss_of_the_whole_one():
    x_0_hat, text_embed = 0.1 * torch.randn(8, 3, 2, 2), torch.randn(8, 3)
    alpha_bar, draw = torch.rand(8), torch.rand(8)

    def loss(rows):
        return clip_loss(
            MeanColourClip(), x_0_hat[rows], text_embed[rows], alpha_bar[rows], draw[rows], settings(share=0.5)
        )

    torch.testing.assert_close(loss(slice(None)), torch.cat([loss(slice(0, 3)), loss(slice(3, 8))]))


def test_a_batch_without_a_carrying_sample_has_a_gradient_of_zero():
    x_0_hat = torch.randn(3, 3, 2, 2, requires_grad=True)
    clip_loss(
        MeanColourClip(), x_0_hat, torch.randn(3, 3), torch.rand(3), torch.full((3,), 0.9), settings(share=0.5)
    ).mean().backward()

    assert x_0_hat.grad is not None
    assert x_0_hat.grad.abs().max() == 0.0


def test_gradient_norms_are_those_of_the_two_terms_and_leave_the_graph():
    output = torch.randn(4, 3, 2, 2, requires_grad=True)
    prediction = output * 1.0
    diffusion, clip = prediction.square().sum(), 3.0 * prediction.sum()

    norms = output_gradient_norms(diffusion, clip, prediction)

    assert norms[0] == pytest.approx(2.0 * output.norm().item(), rel=1e-5)
    assert norms[1] == pytest.approx(3.0 * output.numel() ** 0.5, rel=1e-5)
    (diffusion + clip).backward()
    assert output.grad is not None
