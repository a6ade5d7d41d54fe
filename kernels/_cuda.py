"""Where an op's GPU kernel is registered: only where there is a Triton to compile it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

TRITON = importlib.util.find_spec("triton") is not None


def on_cuda(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as what the op runs on CUDA tensors; without Triton that stays the PyTorch body."""
    return op.register_kernel("cuda") if TRITON else lambda fn: fn


def body(op: Any) -> Callable[..., Any]:
    """The PyTorch body of an op, for what its GPU kernel refuses."""
    return op._init_fn  # torch has no public name for it


def has_float8(device: torch.device) -> bool:
    """Whether the device's tensor cores multiply float8: compute capability 8.9 and later."""
    return torch.cuda.get_device_capability(device) >= (8, 9)
