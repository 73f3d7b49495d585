"""What is counted without weights is what is there with them."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Precision
from pipeline.data.batch import ImageBatch
from pipeline.forecast.count import count_pass, count_training, lightning
from pipeline.training.module import LOSS, StageModule
from tests.support.tiny import OPTIMIZER, LearnerSettings

SIZE, SAMPLES = 16, 4
PRODUCT_FLOPS = SAMPLES * 2 * (SIZE * SIZE) ** 2 * 8
"""torch counts no attention on a CPU: two such products over all pairs of tokens forwards, and five backwards."""


class Attending(nn.Module):
    """A convolution, a norm and attention, as all of the networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.norm(self.convolution(image)).flatten(2).transpose(1, 2)[:, None].contiguous()
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens))


class AttendingModule(StageModule[Attending]):
    def losses(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        return {LOSS: self.network(batch.image_signed()).square().mean()}


def module_of(network: Attending) -> AttendingModule:
    settings = LearnerSettings(
        global_batch_size=SAMPLES, max_samples=SAMPLES, optimizer=OPTIMIZER, dropout=0.0, step_s=0.0
    )
    return AttendingModule(network, settings)


def batch_of(samples: int) -> ImageBatch:
    image = torch.zeros((samples, 3, SIZE, SIZE), dtype=torch.uint8)
    rows = torch.arange(samples)
    return ImageBatch(image, ("a caption",) * samples, rows, rows)


def without_weights(samples: int) -> tuple[AttendingModule, ImageBatch]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return module_of(Attending()), batch_of(samples)


def test_the_flops_of_a_step_are_those_that_torch_counts_on_real_tensors():
    count = count_training(*without_weights(SAMPLES), Precision.FLOAT32)
    real = module_of(Attending())
    real.trainer = lightning(Precision.FLOAT32)
    with FlopCounterMode(display=False) as counter:
        real.training_step(batch_of(SAMPLES), 0)[LOSS].backward()
    assert count.flops == counter.get_total_flops() + 7 * PRODUCT_FLOPS


def test_activations_grow_with_the_samples_and_gradients_do_not():
    small, large = (count_training(*without_weights(samples), Precision.FLOAT32) for samples in (SAMPLES, 2 * SAMPLES))
    assert large.activation_bytes == pytest.approx(2 * small.activation_bytes, rel=0.02)
    gradients = sum(each.numel() * 4 for each in Attending().parameters())
    assert 0 <= small.held_bytes - small.activation_bytes <= gradients


def test_half_precision_takes_fewer_bytes_and_as_many_flops():
    whole, half = (
        count_training(*without_weights(SAMPLES), each) for each in (Precision.FLOAT32, Precision.BFLOAT16_MIXED)
    )
    assert half.flops == whole.flops
    assert half.activation_bytes < whole.activation_bytes


def test_a_pass_without_gradients_is_counted_too():
    with torch.device("meta"):
        network, batch = Attending(), batch_of(SAMPLES)
    count = count_pass(lambda shown: network(shown.image_signed()), batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Attending()(batch_of(SAMPLES).image_signed())
    assert count.flops == counter.get_total_flops() + 2 * PRODUCT_FLOPS
