"""The bare loops that `benchmarks/steps.py` sets beside the real stage, and sampling beside the stock pipeline.

Every loop goes on until it is ended, and sends `Row`s. It works on one batch of random inputs, which lies on the
device, and on captions of the prepared data. A bare loop is what a good engineer writes by hand for one network:
autocast or bf16 in products as the stage has it, fused AdamW, clipping and averages by `torch._foreach`, and nothing
else.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import TrainingStageSettings
from pipeline.data.place import ShardPlace
from pipeline.data.prepared import read_prepared
from pipeline.data.splits import Split
from pipeline.training.precision import multiply_in_bf16
from pipeline.workflow.artifacts import Artifact
from pipeline.workflow.frozen import FrozenStage
from stages.clip.network import ClipModel, ShortTokenizer, Towers, contrastive_loss, load_clip
from stages.clip.settings import ClipNumbers, ClipSettings
from stages.decoder.network import Condition, build_decoder
from stages.decoder.settings import DecoderSettings
from stages.diffusion.clip_loss import similarity
from stages.diffusion.process import DiffusionProcess, Noised
from stages.diffusion.settings import DiffusionStageSettings
from stages.generation.options import GenerationOptions
from stages.generation.text_to_image import chain_of_inputs
from stages.prior.network import build_prior, denoise_prior
from stages.prior.settings import PriorSettings
from stages.upsampler.network import build_upsampler, denoise_upsampler
from stages.upsampler.settings import UpsamplerSettings

MIB = 2**20
LEARNING_RATE = 1e-5
AVERAGED = 0.01
SAMPLED = 16
"""Pictures in a batch of sampling."""


class Loop(StrEnum):
    """What is measured beside the real stage."""

    PLAIN = "plain, eager"
    COMPILED = "plain, torch.compile"
    PEER = "peer"
    SAMPLE = "unclip sample"
    STOCK = "UnCLIPPipeline"


@dataclass(frozen=True)
class Request:
    """One loop: the frozen stage whose network and batch it has, and how many steps make a row."""

    frozen: Path
    loop: Loop
    device: str
    threads: int
    steps_per_row: int


@dataclass(frozen=True)
class Row:
    """What was seen in some steps. On a CPU the rate is by processor time, and memory the resident set's peak."""

    samples_per_s: float = 0.0
    memory_mib: float = 0.0
    parameters: int | None = None
    flops_per_sample: float | None = None
    data_wait_share: float | None = None
    mfu: float | None = None
    instead: str | None = None  # why there is nothing to see


class Stopwatch:
    """Sends a row every few steps. Of loops that are not compiled it counts the FLOPs of the first step."""

    def __init__(self, request: Request, sender: Connection) -> None:
        self.loop = request.loop
        self._on_gpu = request.device == "cuda"
        self._steps_per_row = request.steps_per_row
        self._sender = sender
        self._steps, self._last_s = 0, 0.0
        self._counter = FlopCounterMode(display=False) if request.loop in (Loop.PLAIN, Loop.PEER) else None

    def start(self, batch: int, network: nn.Module | None = None) -> None:
        """The first step begins, of a loop over batches of that size that trains that network."""
        self._batch, self._parameters = batch, parameters_of(network) if network is not None else None
        if self._counter is not None:
            self._counter.__enter__()

    def tick(self) -> None:
        """A step is done."""
        if self._steps == 0 and self._counter is not None:
            self._counter.__exit__(None, None, None)
        self._steps += 1
        if self._steps % self._steps_per_row:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        now_s = time.monotonic() if self._on_gpu else time.process_time()
        rate = self._batch * self._steps_per_row / (now_s - self._last_s)
        memory_mib = torch.cuda.max_memory_allocated() / MIB if self._on_gpu else peak_rss_mib("self")
        flops = self._counter.get_total_flops() / self._batch if self._counter is not None else None
        self._sender.send(Row(rate, memory_mib, self._parameters, flops))
        self._last_s = now_s
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()


def peak_rss_mib(process: int | str) -> float:
    """The peak of a process's resident set."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def parameters_of(network: nn.Module) -> int:
    """How many numbers train."""
    return sum(each.numel() for each in network.parameters() if each.requires_grad)


@dataclass(frozen=True)
class Bench:
    """A stage's settings and inputs, from which every loop builds its own."""

    frozen: FrozenStage
    settings: TrainingStageSettings
    inputs: dict[str, tuple[Artifact, ...]]
    device: torch.device

    @property
    def batch(self) -> int:
        """Samples in a step."""
        return self.settings.global_batch_size

    def captions(self, number: int) -> list[str]:
        """Captions of the training split, from its beginning again where it is too short."""
        (reference,) = self.frozen.inputs["data"]
        place = None if reference.place is None else ShardPlace.model_validate(reference.place)
        data = read_prepared(self.inputs["data"][0].path, place)
        return [data.caption(int(row)) for row in islice(cycle(data.samples_in(Split.TRAIN)), number)]

    def pictures(self, size: int) -> Tensor:
        """A batch of noise, float [B, 3, S, S] in [-1, 1]."""
        return torch.rand(self.batch, 3, size, size, device=self.device) * 2 - 1

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU; on a CPU nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


@dataclass(frozen=True)
class Work:
    """A network that trains, what is called of it, the loss by that call, and what else is called."""

    network: nn.Module
    forward: Callable[..., Any]
    loss: Callable[[Callable[..., Any]], Tensor]
    frozen: tuple[nn.Module, ...] = ()


def clip_work(bench: Bench) -> Work:
    """Both towers on the batch, and the contrastive loss."""
    settings = cast(ClipSettings, bench.settings)
    model = ClipModel(settings.network, settings.loss).to(bench.device)
    tokens = ShortTokenizer(settings.network.context_length)(bench.captions(bench.batch)).to(bench.device)
    image, objective = bench.pictures(settings.network.image_size), contrastive_loss(settings.loss, 0, 1)

    def forward(image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model.encode_image(image), model.encode_text(tokens).embed

    def loss(forward: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return objective(*forward(image, tokens), model.logit_scale, model.logit_bias)

    return Work(model, forward, loss)


def noise(process: DiffusionProcess, x_0: Tensor) -> Noised:
    """Data noised to random timesteps."""
    timestep = torch.randint(process.schedule.timesteps, (len(x_0),), device=x_0.device)
    drawn = torch.randn_like(x_0)
    return Noised(process.schedule.add_noise(x_0, drawn, timestep), timestep, x_0, drawn)


def process_of(bench: Bench) -> DiffusionProcess:
    """The stage's diffusion process on the device."""
    settings = cast(DiffusionStageSettings, bench.settings)
    return DiffusionProcess(settings.schedule, settings.objective).to(bench.device)


def prior_work(bench: Bench) -> Work:
    """The frozen text tower and the prior on the batch."""
    settings, (clip_artifact,) = cast(PriorSettings, bench.settings), bench.inputs["clip"]
    clip, sizes = load_clip(clip_artifact, Towers.TEXT, bench.device), clip_artifact.numbers(ClipNumbers)
    network = build_prior(settings.network, sizes.embed_dim, sizes.context_length).to(bench.device)
    process, x_0 = process_of(bench), torch.randn(bench.batch, sizes.embed_dim, device=bench.device)
    tokens = clip.tokenize(bench.captions(bench.batch)).to(bench.device)

    def loss(forward: Any) -> Tensor:
        noised = noise(process, x_0)
        with torch.no_grad():
            text = clip.encode_text(tokens)
        return process.loss(denoise_prior(forward, noised.x_t, noised.timestep, text), noised).mean()

    return Work(network, network, loss, (clip,))


def decoder_work(bench: Bench) -> Work:
    """The frozen text tower and the decoder on the batch, and the CLIP loss on the share of it that the stage takes."""
    settings, (clip_artifact,) = cast(DecoderSettings, bench.settings), bench.inputs["clip"]
    clip = load_clip(clip_artifact, Towers.BOTH if settings.clip_loss.weight else Towers.TEXT, bench.device)
    clip.requires_grad_(False)
    network = build_decoder(settings, clip.settings.embed_dim).to(bench.device)
    process, x_0 = process_of(bench), bench.pictures(settings.image_size)
    image_embed = torch.randn(bench.batch, clip.settings.embed_dim, device=bench.device)
    tokens = clip.tokenize(bench.captions(bench.batch)).to(bench.device)
    carrying = round(bench.batch * settings.clip_loss.sample_share) if settings.clip_loss.weight else 0

    def loss(forward: Callable[..., Tensor]) -> Tensor:
        noised = noise(process, x_0)
        with torch.no_grad():
            text = clip.encode_text(tokens)
        prediction = forward(noised.x_t, noised.timestep, Condition(image_embed, text))
        loss = process.loss(prediction, noised).mean()
        if carrying:
            x_0_hat = process.x_0(prediction, noised)[:carrying]
            loss = loss - settings.clip_loss.weight * similarity(clip, x_0_hat, text.embed[:carrying]).mean()
        return loss

    return Work(network, network, loss, (clip,))


def upsampler_work(bench: Bench) -> Work:
    """The upsampler on crops and small pictures that are there already."""
    settings = cast(UpsamplerSettings, bench.settings)
    network = build_upsampler(settings.network, settings.high_size).to(bench.device)
    process, x_0, condition = process_of(bench), *(bench.pictures(settings.crop_size) for _ in range(2))

    def loss(forward: Any) -> Tensor:
        noised = noise(process, x_0)
        return process.loss(denoise_upsampler(forward, noised.x_t, noised.timestep, condition), noised).mean()

    return Work(network, network, loss)


WORK = {"clip": clip_work, "prior": prior_work, "decoder": decoder_work, "upsampler": upsampler_work}


def plain(bench: Bench, watch: Stopwatch) -> None:
    """The bare loop."""
    work = WORK[bench.frozen.kind](bench)
    work.network.train()
    multiply_in_bf16((work.network, *work.frozen), bench.frozen.trainer, bench.device.type)
    forward = torch.compile(work.forward) if watch.loop is Loop.COMPILED else work.forward
    parameters = [each for each in work.network.parameters() if each.requires_grad]
    averages = [each.detach().clone() for each in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    watch.start(bench.batch, work.network)
    while True:
        with bench.autocast():
            loss = work.loss(forward)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, [each.detach() for each in parameters], AVERAGED)
        watch.tick()


@torch.no_grad()
def sampling(bench: Bench, watch: Stopwatch) -> None:
    """Pictures from captions, by this project's chain or by the stock pipeline on the exported model: equal steps."""
    captions = ["a small red circle"] * SAMPLED
    if watch.loop is Loop.SAMPLE:
        chain = chain_of_inputs(bench.inputs, bench.device)
        draw = partial(chain.generate, captions, range(SAMPLED), GenerationOptions())
    else:
        from diffusers import UnCLIPPipeline

        export = bench.frozen.store.find(bench.frozen.stage, bench.frozen.fingerprint)
        assert export is not None, "it is made before this process starts"
        pipeline = UnCLIPPipeline.from_pretrained(export.path).to(bench.device)
        pipeline.set_progress_bar_config(disable=True)
        prior = bench.inputs["prior"][0].settings(PriorSettings).sampler
        decoder = bench.inputs["decoder"][0].settings(DecoderSettings).sampler
        upsampler = bench.inputs["upsampler"][0].settings(UpsamplerSettings).sampler
        draw = partial(
            pipeline, captions, prior_guidance_scale=prior.guidance_scale, prior_num_inference_steps=prior.steps,
            decoder_guidance_scale=decoder.guidance_scale, decoder_num_inference_steps=decoder.steps,
            super_res_num_inference_steps=upsampler.steps,
        )  # fmt: skip
    watch.start(SAMPLED)
    while True:
        with bench.autocast():
            draw()
        watch.tick()
