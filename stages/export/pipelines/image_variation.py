"""diffusers' `UnCLIPImageVariationPipeline` with the defaults of the run beside it, where the stock one has guidance 8.

`unclip export` puts this file into the directory that it writes; it imports nothing of unclip.
"""

from typing import Any

from diffusers import UnCLIPImageVariationPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection


class ImageVariationPipeline(UnCLIPImageVariationPipeline):
    """Variations of pictures. `sampling`, the run's arguments of `__call__`, stands in `model_index.json`."""

    def __init__(
        self,
        decoder: UNet2DConditionModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_proj: UnCLIPTextProjModel,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection,
        super_res_first: UNet2DModel,
        super_res_last: UNet2DModel,
        decoder_scheduler: UnCLIPScheduler,
        super_res_scheduler: UnCLIPScheduler,
        sampling: dict | None = None,
    ) -> None:
        super().__init__(
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_proj=text_proj,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
        )
        own = {name: value for name, value in (sampling or {}).items() if not name.startswith("prior_")}
        self.register_to_config(sampling=own)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest by name alone
        self, image: Any = None, num_images_per_prompt: int = 1, **options: Any
    ) -> Any:
        """As `UnCLIPImageVariationPipeline`; what is not given is as the run was sampled."""
        return super().__call__(image, num_images_per_prompt, **{**self.config["sampling"], **options})
