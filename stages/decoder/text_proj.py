"""From CLIP's embeddings to what the decoder's U-Net takes (unCLIP, section 2.1)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class TextProjection(nn.Module):
    """Adds both embeddings to the timestep's, and puts extra tokens of the image's before the caption's tokens.

    The weights have the names that diffusers' `UnCLIPTextProjModel` gives them, and are drawn in its order; that class
    is of a pipeline which diffusers calls deprecated.
    """

    def __init__(self, embed_dim: int, time_embed_dim: int, cross_attention_dim: int, extra_tokens: int) -> None:
        super().__init__()
        self.extra_tokens = extra_tokens
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(embed_dim))
        self.embedding_proj = nn.Linear(embed_dim, time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(embed_dim, time_embed_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(embed_dim, extra_tokens * cross_attention_dim)
        self.encoder_hidden_states_proj = nn.Linear(embed_dim, cross_attention_dim)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embed: Tensor, text_embed: Tensor, text_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, extra + L, W] to attend to, and what is added to the timestep's embedding [B, T].

        Of CLIP's embeddings [B, E] of picture and caption, and the states [B, L, E] of the caption's tokens.
        """
        time_embed = self.clip_image_embeddings_project_to_time_embeddings(image_embed) + self.embedding_proj(
            text_embed
        )
        # The stock class reshapes so: a token's values stand `extra_tokens` apart.
        extra = self.clip_extra_context_tokens_proj(image_embed).unflatten(1, (-1, self.extra_tokens)).transpose(1, 2)
        hidden = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text_hidden))
        return torch.cat([extra, hidden], dim=1), time_embed

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of diffusers' class for these weights."""
        return {
            "clip_extra_context_tokens": self.extra_tokens,
            "clip_embeddings_dim": self.embedding_proj.in_features,
            "time_embed_dim": self.embedding_proj.out_features,
            "cross_attention_dim": self.encoder_hidden_states_proj.out_features,
        }

    def save(self, directory: Path) -> None:
        """Write the directory that `UnCLIPTextProjModel.from_pretrained` reads."""
        directory.mkdir()
        config = {"_class_name": "UnCLIPTextProjModel", **self.sizes}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: each.contiguous() for name, each in self.state_dict().items()}
        save_file(weights, directory / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
