"""Tiny seeded models on which every rewrite of a graph is tested.

The weights are random on purpose: a freshly initialised transformer has unit norm gains and zero
biases, and a fold that forgets one of them would pass. `Entry.load` redraws them.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .decoders import DECODERS
from .others import OTHERS
from .user_modules import USER_MODULES

__all__ = ["KINDS", "ZOO", "Entry", "harden"]

KINDS = ("decoder", "moe", "encoder", "vision", "encoder-decoder", "user")


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: The key in `ZOO`; it also seeds the weights.
        build: Makes the module, with its library's own initialisation.
        inputs: Makes the keyword arguments of a forward call. Integer tensors are (batch,
            sequence); of the others only the first dimension is a batch.
        kind: One of `KINDS`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    kind: str

    def load(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model (eval mode, float32) and its inputs, the same at every call."""
        seed = zlib.crc32(self.name.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        model = model.eval().to(torch.float32)
        harden(model, torch.Generator().manual_seed(seed))
        return model, self.inputs()


@torch.no_grad()
def harden(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw the parameters so that no gain is one, no bias zero and no layer negligible.

    Shared parameters are drawn once; buffers and vectors that are neither gain nor bias stay.
    """
    seen: set[int] = set()
    for module in model.modules():
        for leaf, param in module.named_parameters(recurse=False):
            if id(param) in seen or not param.numel():
                continue
            seen.add(id(param))
            noise = torch.randn(param.shape, generator=generator)
            first = param.flatten()[0].item()
            constant = bool((param == first).all())
            if isinstance(module, nn.Embedding):
                param.copy_(noise)
            elif leaf.endswith("bias"):
                param.copy_(0.2 * noise)
            elif constant and (param.ndim <= 1 or first != 0):
                # A gain starts at one, or at zero where the layer computes `1 + gain`. Zero
                # matrices (some routers start so) are weights, and fall through.
                param.copy_(first * (1 + 0.3 * noise) if first else 0.3 * noise)
            elif param.ndim > 1:
                param.copy_(noise * _fan_in(module, param) ** -0.5)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return weight[0].numel()
    # Conv1D keeps (in, out), and some expert stacks keep (expert, in, out).
    if isinstance(module, Conv1D) or getattr(module, "is_transposed", False):
        return weight.shape[-2]
    return weight.shape[-1]


ZOO: dict[str, Entry] = {row[0]: Entry(*row) for row in (*DECODERS, *OTHERS, *USER_MODULES)}
