"""Small pictures to larger ones."""

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from pipeline.data.draws import SampleDraws
from stages.diffusion.sampler import Constrain, NetworkSampler
from stages.diffusion.settings import SamplerOptions
from stages.pictures import resize
from stages.upsampler.network import denoise_upsampler
from stages.upsampler.settings import UpsamplerSettings

OWN_SAMPLER = SamplerOptions()


class UpsamplerSampler(NetworkSampler[UNet2DModel, UpsamplerSettings]):
    """Draws high-resolution pictures for low-resolution ones."""

    def sample(
        self, low: Tensor, draws: SampleDraws, options: SamplerOptions = OWN_SAMPLER, known: Constrain | None = None
    ) -> Tensor:
        """Pictures float32 [B, 3, high_size, high_size] in [-1, 1] for [B, 3, low_size, low_size] in [-1, 1].

        `known` puts what must stay into every x0_hat.
        """
        size = self.settings.high_size
        condition = resize(low, size)
        return self.draw(
            lambda x_t, timestep: denoise_upsampler(self.network, x_t, timestep, condition),
            draws,
            f"upsampler {size}",
            (3, size, size),
            options.over(self.settings.sampler),
            constrain=known,
        )
