"""`pipeline.training.worker` with identities before attention: the graph that DeepSpeed's hooks for ZeRO-3 make.

Query, key and value of self-attention are one tensor. With a node before each they are three, which PyTorch projects
one by one, and whose gradients it adds up in another order.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.worker import main


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


def split(attend: Any) -> Any:
    def attend_to_three(
        module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Any:
        return attend(module, *map(Identity.apply, (query, key, value)), **options)

    return attend_to_three


if __name__ == "__main__":
    nn.MultiheadAttention.forward = split(nn.MultiheadAttention.forward)
    sys.exit(main())
