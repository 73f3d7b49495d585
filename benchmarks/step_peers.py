"""What other projects train with, for `benchmarks/steps.py`, and the process that any of its loops runs in.

A peer trains a network of its own with the code that it comes with.
"""

import os
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, cast

import torch
from step_loops import LEARNING_RATE, WORK, Bench, Loop, Request, Row, Stopwatch, parameters_of, plain, sampling
from torch import Tensor, nn

from pipeline.config import TrainingStageSettings
from pipeline.workflow.frozen import read_frozen
from stages.clip.network import ClipModel
from stages.clip.settings import ClipNumbers, ClipSettings
from stages.decoder.networks.unet import UNetDecoderSettings
from stages.decoder.settings import DecoderSettings
from stages.prior.settings import PriorSettings


def open_clip_peer(bench: Bench, watch: Stopwatch) -> None:
    """open_clip's `train_one_epoch` on its own towers of the same sizes, with the optimiser of its `main`."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    settings = cast(ClipSettings, bench.settings)
    clip = ClipModel(settings.network).to(bench.device)
    tokens = clip.tokenize(bench.captions(bench.batch)).to(bench.device)
    image, model = bench.pictures(settings.network.image_size), clip.network
    model.output_dict = True
    groups = [
        {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
        {"params": [each for each in model.parameters() if each.ndim >= 2], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
    watch.start(bench.batch, model)

    class Batches:
        num_batches = num_samples = 10**9

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield image, tokens
                watch.tick()

    arguments = SimpleNamespace(
        device=bench.device.type, precision="amp_bf16" if bench.device.type == "cuda" else "fp32", distill=False,
        accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=1.0, rank=0, local_rank=0, log_local=False,
        log_every_n_steps=100, batch_size=bench.batch, world_size=1, wandb=False,
    )  # fmt: skip
    data = {"train": SimpleNamespace(dataloader=Batches(), set_epoch=lambda _: None)}
    train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, arguments)


def closest(build: Callable[[int], nn.Module], target: int, step: int) -> nn.Module:
    """Of `build(step)`, `build(2 * step)`, ... the one whose number of parameters is closest to the target."""
    before = 0
    for size in count(step, step):
        with torch.device("meta"):
            found = parameters_of(build(size))
        if found >= target:
            return build(size if found - target <= target - before else size - step)
        before = found
    raise AssertionError("`count` has no end")


def dalle2_peer(bench: Bench, watch: Stopwatch) -> None:
    """dalle2-pytorch's trainer on its own network of the same width, resolution and (nearly) number of parameters.

    It is given encoded captions, where the stage runs the frozen text tower, and has no CLIP loss.
    """
    from accelerate import Accelerator
    from dalle2_pytorch import Decoder, DiffusionPrior, DiffusionPriorNetwork, Unet
    from dalle2_pytorch.trainer import DecoderTrainer, DiffusionPriorTrainer

    target = parameters_of(WORK[bench.frozen.kind](bench).network)
    length, width = (sizes := bench.inputs["clip"][0].numbers(ClipNumbers)).context_length, sizes.embed_dim
    accelerator = Accelerator(
        mixed_precision="bf16" if bench.device.type == "cuda" else "no", cpu=bench.device.type == "cpu"
    )
    options: dict[str, Any] = {"accelerator": accelerator, "lr": LEARNING_RATE, "max_grad_norm": 1.0}
    inputs: dict[str, Tensor] = {}
    if isinstance(bench.settings, PriorSettings):
        prior = bench.settings.network
        width = prior.heads * prior.head_dim

        def build(depth: int) -> nn.Module:
            sizes = {"depth": depth, "heads": prior.heads, "dim_head": prior.head_dim, "max_text_len": length}
            return DiffusionPriorNetwork(dim=width, num_timesteps=1000, **sizes)

        network = closest(build, target, step=1)
        trained = DiffusionPrior(network, image_embed_dim=width, cond_drop_prob=0.1).to(bench.device)
        trainer = DiffusionPriorTrainer(trained, **options)
        inputs["text_embed"] = torch.randn(bench.batch, width, device=bench.device)
    else:
        settings = cast(DecoderSettings, bench.settings)
        unet = cast(UNetDecoderSettings, settings.network)

        def build(dim: int) -> nn.Module:
            return Unet(
                dim=dim, dim_mults=tuple(each // unet.channels[0] for each in unet.channels), image_embed_dim=width,
                text_embed_dim=width, cond_on_text_encodings=True, cond_on_image_embeds=True, max_text_len=length,
                self_attn=unet.attention, attn_dim_head=unet.attention_head_dim,
                attn_heads=unet.channels[-1] // unet.attention_head_dim, num_resnet_blocks=unet.layers_per_block,
            )  # fmt: skip

        network = closest(build, target, step=8)
        trainer = DecoderTrainer(Decoder(network, image_size=settings.image_size).to(bench.device), **options)
        inputs["image"] = bench.pictures(settings.image_size) * 0.5 + 0.5
    inputs["image_embed"] = torch.randn(bench.batch, width, device=bench.device)
    inputs["text_encodings"] = torch.randn(bench.batch, length, width, device=bench.device)
    trainer.train()
    watch.start(bench.batch, network)
    while True:
        trainer(**{name: each.clone() for name, each in inputs.items()})  # it scales some of them in place
        trainer.update()
        watch.tick()


PEERS = {"clip": open_clip_peer, "prior": dalle2_peer, "decoder": dalle2_peer}


def run_loop(request: Request, sender: Connection) -> None:
    """Send rows until this process is ended, or one that says why there are none."""
    os.setsid()
    torch.set_num_threads(request.threads)
    frozen = read_frozen(request.frozen)
    settings = cast(TrainingStageSettings, frozen.read_settings())
    bench = Bench(frozen, settings, frozen.find_inputs(), torch.device(request.device))
    loops = {Loop.PEER: PEERS.get(frozen.kind), Loop.SAMPLE: sampling, Loop.STOCK: sampling}
    try:
        (loops.get(request.loop) or plain)(bench, Stopwatch(request, sender))
    except ImportError as error:
        sender.send(Row(instead=f"not installed ({error.name})"))
    except torch.OutOfMemoryError:
        sender.send(Row(instead="out of memory"))
