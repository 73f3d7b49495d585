"""diffusers' `UnCLIPPipeline` with the defaults of the run beside it, where the stock one has 4 and 8 for its guidance.

`unclip export` puts this file into the directory that it writes; it imports nothing of unclip.
"""

from typing import Any

from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer


class TextToImagePipeline(UnCLIPPipeline):
    """Pictures from captions. `sampling`, the run's arguments of `__call__`, stands in `model_index.json`."""

    def __init__(
        self,
        prior: PriorTransformer,
        decoder: UNet2DConditionModel,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_proj: UnCLIPTextProjModel,
        super_res_first: UNet2DModel,
        super_res_last: UNet2DModel,
        prior_scheduler: UnCLIPScheduler,
        decoder_scheduler: UnCLIPScheduler,
        super_res_scheduler: UnCLIPScheduler,
        sampling: dict | None = None,
    ) -> None:
        super().__init__(
            prior=prior,
            decoder=decoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_proj=text_proj,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            prior_scheduler=prior_scheduler,
            decoder_scheduler=decoder_scheduler,
            super_res_scheduler=super_res_scheduler,
        )
        self.register_to_config(sampling=dict(sampling or {}))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest by name alone
        self, prompt: str | list[str] | None = None, num_images_per_prompt: int = 1, **options: Any
    ) -> Any:
        """As `UnCLIPPipeline`; what is not given is as the run was sampled."""
        return super().__call__(prompt, num_images_per_prompt, **{**self.config["sampling"], **options})
