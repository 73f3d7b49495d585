"""A trained run as an object for Python: all that its networks make of captions and pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.mixing import named_seed
from pipeline.data.square import resized_square
from pipeline.errors import UserError
from pipeline.workflow.artifacts import Artifact
from stages.clip.network import load_clip
from stages.generation.captions import require_captions
from stages.generation.making import evaluations, make
from stages.generation.options import (
    BATCH_SIZE,
    OWN_SAMPLERS,
    GenerationOptions,
    Judge,
    require_count,
    require_seed,
    require_share,
)
from stages.generation.picture import Noise, Operation, Picture, Recipe, as_image, pixels_sha256, require_mask
from stages.generation.text_to_image import TextToImage

GivenPicture = str | Path | Image.Image | Picture
"""A picture of the user's: a file of any usual format, Pillow's, or one that was made here."""


@dataclass(frozen=True)
class Origin:
    """Where networks come from: the run, the fingerprints of their artifacts by stage, and the code's version."""

    run: str
    artifacts: dict[str, str]
    version: str


class Model:
    """DALL·E 2 as one run trained it. Call it with a caption; see the methods for what else it does.

    Every method returns pictures that know how they were made (`Picture.recipe`), so that `again` makes them once more.
    What is drawn for a picture follows from its own seed and captions, and not from what else is made in its batch.
    """

    def __init__(
        self,
        chain: TextToImage,
        origin: Origin,
        fabric: Fabric,
        judge_clip: Artifact | None = None,
        batch_size: int = BATCH_SIZE,
        shows_progress: bool = True,
    ) -> None:
        """`stages.load` makes one of a run. `judge_clip` is a CLIP that nothing was fitted to, for picking the best."""
        require_count(batch_size, "batch_size=")
        self.chain = chain
        self.origin = origin
        self.batch_size = batch_size
        self.shows_progress = shows_progress
        self._fabric = fabric
        self._judge_clip = judge_clip

    @property
    def size(self) -> int:
        """The side of the pictures that it makes, in pixels."""
        return self.chain.final_size

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        count: int = 1,
        seed: int = 0,
        options: GenerationOptions = OWN_SAMPLERS,
        best_of: int = 1,
        judge: Judge = Judge.CLIP,
    ) -> list[Picture]:
        """`count` pictures for each caption, in the captions' order.

        Of `best_of` pictures for each that is asked for, the one is kept that a CLIP finds nearest to the caption: the
        run's own, or by `judge` the one that nothing was fitted to.
        """
        said = require_captions([captions] if isinstance(captions, str) else captions, self.chain.clip)
        require_count(best_of, "best_of=")
        judge = Judge(judge)
        recipes = [
            recipe
            for caption in said
            for recipe in self._several(Operation.TEXT_TO_IMAGE, count * best_of, seed, options, captions=(caption,))
        ]
        pictures = self._make(recipes)
        return pictures if best_of == 1 else self._best(pictures, best_of, judge)

    def variations(
        self,
        picture: GivenPicture,
        *,
        count: int = 4,
        seed: int = 0,
        eta: float = 1.0,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """Pictures with the embedding z_i of one, and the noise x_T by which the decoder comes back to it (unCLIP,
        section 3.1). With `eta` = 0 all are its reconstruction; the nearer to 1, the more they differ."""
        require_share(eta, "eta=")
        return self._make(self._several(Operation.VARIATION, count, seed, options.with_decoder_eta(eta)), [picture])

    def interpolate(
        self,
        first: GivenPicture,
        second: GivenPicture,
        *,
        count: int = 5,
        seed: int = 0,
        noise: Noise = Noise.INTERPOLATED,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """Pictures on the way from one to another, both ends included: z_i, and by `noise` x_T too, are interpolated on
        the sphere (unCLIP, section 3.2)."""
        return self._make(self._way(Operation.INTERPOLATION, count, seed, options, noise=noise), [first, second])

    def interpolate_captions(
        self,
        first: str,
        second: str,
        *,
        count: int = 5,
        seed: int = 0,
        noise: Noise = Noise.FIXED,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """Pictures on the way from one caption to another: between the embeddings z_i that the prior draws for them."""
        said = tuple(require_captions([first, second], self.chain.clip))
        return self._make(self._way(Operation.CAPTION_INTERPOLATION, count, seed, options, captions=said, noise=noise))

    def text_diff(
        self,
        picture: GivenPicture,
        source: str,
        target: str,
        *,
        count: int = 5,
        strength: float = 0.5,
        seed: int = 0,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """A picture of what `source` says on its way to what `target` says: z_i turned along z_t(target) - z_t(source),
        up to a share `strength` of the way, with x_T kept (unCLIP, section 3.3; there 0.25 to 0.5)."""
        said = tuple(require_captions([source, target], self.chain.clip))
        require_share(strength, "strength=")
        way = self._way(Operation.TEXT_DIFF, count, seed, options, to=strength, captions=said)
        return self._make(way, [picture])

    def inpaint(
        self,
        picture: GivenPicture,
        mask: GivenPicture,
        caption: str,
        *,
        count: int = 1,
        seed: int = 0,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """Pictures for a caption in which only the white part of `mask`, of the picture's size, is drawn.

        The rest of its central square stays exactly, at the model's size."""
        (said,) = require_captions([caption], self.chain.clip)
        image, drawn = as_image(picture), as_image(mask)
        require_mask(drawn, image)
        recipes = self._several(Operation.INPAINTING, count, seed, options, captions=(said,))
        return self._make(recipes, [image, drawn])

    def image_to_image(
        self,
        picture: GivenPicture,
        caption: str,
        *,
        strength: float = 0.6,
        count: int = 1,
        seed: int = 0,
        options: GenerationOptions = OWN_SAMPLERS,
    ) -> list[Picture]:
        """Pictures for a caption that are begun from one: with a `strength` near 0 they are all but it, with 1 nothing
        of it is left."""
        (said,) = require_captions([caption], self.chain.clip)
        require_share(strength, "strength=")
        recipes = self._several(Operation.IMAGE_TO_IMAGE, count, seed, options, captions=(said,), strength=strength)
        return self._make(recipes, [picture])

    def again(self, recipe: Recipe, pictures: Sequence[GivenPicture] = ()) -> Picture:
        """The picture of a recipe, of this very model. `pictures` are those that it was made from, the mask last.

        Raises:
            UserError: other networks made it, or other pictures than these are its sources.
        """
        other = [stage for stage, each in recipe.artifacts.items() if self.origin.artifacts.get(stage) != each]
        if other:
            raise UserError(
                f"the picture was made by another {', '.join(other)} than run {self.origin.run} has; "
                "use load_for(recipe)"
            )
        sources = [self._square(as_image(each)) for each in pictures]
        found = tuple(map(pixels_sha256, sources))
        if found != recipe.sources:
            raise UserError(
                f"the picture was made from {len(recipe.sources)} others, and the {len(found)} given are not these; "
                "give the same files in the same order (--picture A --picture B)"
            )
        return self._make([recipe], sources)[0]

    def _several(
        self, operation: Operation, count: int, seed: int, options: GenerationOptions, **details: Any
    ) -> list[Recipe]:
        """Of pictures that differ in their own seeds alone; `details` are of `Recipe`."""
        require_count(count)
        require_seed(seed)
        name = " ".join(details.get("captions", [operation.value]))
        seeds = [named_seed(seed, name, number) for number in range(count)]
        return [self._recipe(operation, seed=each, options=options, **details) for each in seeds]

    def _way(
        self,
        operation: Operation,
        count: int,
        seed: int,
        options: GenerationOptions,
        *,
        to: float = 1.0,
        **details: Any,
    ) -> list[Recipe]:
        """Of pictures that lie evenly from 0 to a share `to` of a way, and have all that is drawn in common."""
        require_count(count)
        require_seed(seed)
        seed = named_seed(seed, operation.value)
        shares = [to * place / max(count - 1, 1) for place in range(count)]
        options = options.with_decoder_eta(0.0)
        return [self._recipe(operation, seed=seed, options=options, share=each, **details) for each in shares]

    def _recipe(self, operation: Operation, **details: Any) -> Recipe:
        return Recipe(operation=operation, **vars(self.origin), **details)

    def _make(self, recipes: Sequence[Recipe], given: Sequence[GivenPicture] = ()) -> list[Picture]:
        """The pictures of recipes that differ in captions, seed and share alone."""
        recipes[0].options.check(
            self.chain.prior.settings if self.chain.prior else None,
            self.chain.decoder.settings,
            [each.settings for each in self.chain.upsamplers],
        )
        require_captions([recipes[0].options.negative_caption], self.chain.clip)
        sources = [self._square(as_image(each)) for each in given]
        recipes = [each.model_copy(update={"sources": tuple(map(pixels_sha256, sources))}) for each in recipes]
        images = torch.stack([_signed(each) for each in sources]) if sources else torch.empty(0)
        with self._progress(recipes), self._fabric.autocast(), torch.no_grad():
            made = list(make(self.chain, recipes, images.to(self.chain.device), self.batch_size))
        return [Picture(image, recipe) for image, recipe in zip(made, recipes, strict=True)]

    def _square(self, image: Image.Image) -> Image.Image:
        """The central square at the size of the pictures that the model makes."""
        pixels = resized_square(np.array(image), self.size)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    @contextmanager
    def _progress(self, recipes: Sequence[Recipe]) -> Iterator[None]:
        """A bar on standard error, or in the notebook, of the networks' evaluations."""
        at_first, for_each = evaluations(self.chain, recipes[0])
        batches = -(-len(recipes) // self.batch_size)
        total = at_first + batches * for_each
        console = Console(stderr=True)
        is_shown = self.shows_progress and (console.is_terminal or console.is_jupyter)
        with Progress(console=console, transient=True, disable=not is_shown) as progress:
            task = progress.add_task(f"{len(recipes)} pictures", total=total)
            for each in self.chain.samplers:
                each.on_step = lambda: progress.advance(task)
            try:
                yield
            finally:
                for each in self.chain.samplers:
                    each.on_step = None

    @torch.no_grad()
    def _best(self, pictures: Sequence[Picture], best_of: int, judge: Judge) -> list[Picture]:
        """Of each `best_of` pictures that follow each other, the one most similar to its caption."""
        clip = self.chain.clip
        if judge is Judge.JUDGE_CLIP:
            if self._judge_clip is None:
                raise UserError(f"run {self.origin.run} has no stage {judge.value}; judge by its own clip")
            clip = load_clip(self._judge_clip, device=self.chain.device)
        best = []
        with self._fabric.autocast():
            for first in range(0, len(pictures), best_of):
                candidates = pictures[first : first + best_of]
                images = torch.stack([_signed(each.image) for each in candidates]).to(self.chain.device)
                captions = clip.tokenize([candidates[0].recipe.captions[0]]).to(self.chain.device)
                scores = F.cosine_similarity(clip.encode_image(images), clip.encode_text(captions).embed)
                best.append(candidates[int(scores.argmax())])
        return best


def _signed(image: Image.Image) -> Tensor:
    """float32 [3, S, S] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
