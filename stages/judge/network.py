"""The judge: a small convolutional classifier that reads the attributes of a drawn scene off a picture."""

import torch
from torch import Tensor, nn

from pipeline.workflow.artifacts import Artifact
from stages.judge.labels import CLASSES
from stages.judge.settings import JudgeSettings
from stages.pictures import resize
from stages.weights import CPU, load_weights


class Judge(nn.Module):
    """One classification head per attribute of `CLASSES`, on a common convolutional body."""

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__()
        self.image_size, width = settings.image_size, settings.width
        last_size = self.image_size // 8
        self.body = nn.Sequential(
            _block(3, width, kernel=5, stride=2),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 2 * width),
            _block(2 * width, 4 * width, stride=2),
            _block(4 * width, 4 * width),
            nn.Flatten(),
        )
        self.heads = nn.Linear(4 * width * last_size**2, sum(map(len, CLASSES.values())))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits float [B, classes] of every attribute for pictures float [B, 3, S, S] in [-1, 1], any S."""
        if image.shape[-1] != self.image_size:
            image = resize(image, self.image_size)
        return self.heads(self.body(image)).split([len(classes) for classes in CLASSES.values()], dim=1)

    @torch.no_grad()
    def read(self, image: Tensor) -> Tensor:
        """The likeliest class of every attribute, int64 [B, A], for pictures float [B, 3, S, S]; clamped to [-1, 1]."""
        return torch.stack([logits.argmax(1) for logits in self(image.clamp(-1, 1))], dim=1)


def load_judge(artifact: Artifact, device: torch.device = CPU) -> Judge:
    """The judge of an artifact."""
    settings = artifact.settings(JudgeSettings)
    return load_weights(lambda: Judge(settings), artifact, device)


def _block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2),
        nn.GroupNorm(4, channels_out),
        nn.ReLU(),
    )
