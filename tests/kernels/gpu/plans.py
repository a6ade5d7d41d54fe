"""Calls to make launch plans of, in Triton's interpreter."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.kernels import _tiled, w4a16_linear
from qfx.kernels.pack import store
from tests.kernels.law import make_case

pytest.importorskip("triton")

from qfx.kernels.gpu import parts, plan, w4
from qfx.kernels.gpu.launch import Bound, Launcher
from qfx.kernels.gpu.linear8 import linear8

Weights = dict[str, Tensor | None]
Call = tuple[Callable[[Tensor], Tensor], Weights, Tensor]


def tensor_at(address: int, dtype: torch.dtype, shape: Any, stride: Any) -> Tensor:
    """Memory as a tensor."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(shape, stride)


def by_address(self: Launcher, grid: tuple[int, ...], args: tuple[Any, ...]) -> Bound:
    """As a compiled kernel is bound: it takes addresses, behind what every launch takes."""
    likes = [(t.dtype, t.shape, t.stride()) if isinstance(t := getattr(a, "base", a), Tensor) else None for a in args]
    front = (*grid, 0, "function", "packed", None, None, None)

    def run(*given: Any) -> None:
        assert given[: len(front)] == front and given[-1] == "constant"
        made = []
        for v, like in zip(given[len(front) : -1], likes, strict=True):
            if hasattr(v, "block_shape"):  # of its base, a compiled kernel takes the address
                v = copy.copy(v)
                v.base = tensor_at(v.base.data_ptr(), *like)
            made.append(tensor_at(v, *like) if like and isinstance(v, int) else v)
        self.launch(grid, tuple(made))

    return Bound(run, front, ("constant",), True)


def allow_cpu(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Plans for CPU tensors, in the interpreter, that take tensors or addresses."""
    monkeypatch.setattr(plan, "_on", lambda x: (-1, 0))
    if form == "addresses":
        monkeypatch.setattr(Launcher, "bind", by_address)


def w4_call(name: str, monkeypatch: pytest.MonkeyPatch, config: w4.Config | None = None, lead: Any = (3,)) -> Call:
    if config is not None:
        monkeypatch.setattr(w4, "pick", lambda *_: config)
    # on a GPU there is a pool for each stream
    monkeypatch.setattr(w4, "counters", lambda number, device: parts._pools[0, 0])
    monkeypatch.setitem(parts._pools, (0, 0), torch.zeros(1024, dtype=torch.int32))
    case = make_case(lead, 256, 40, name, torch.bfloat16)
    grid = case.weight.spec.grid
    made = w4a16_linear.prepare(store(case.weight), bits=grid.bits, in_features=256, signed=grid.signed)
    weights: Weights = {**made, "bias": case.bias}

    def compute(x: Tensor) -> Tensor:
        w = weights
        return _tiled.on_gpu(x, w["tiles"], w["scale"], w["zero"], w["order"], w["bias"], 40, 128)

    return compute, weights, case.x


def linear8_call(name: str, monkeypatch: pytest.MonkeyPatch, lead: Any = (3,)) -> Call:
    case = make_case(lead, 64, 24, name, torch.bfloat16)
    weights: Weights = dict(codes=case.weight.codes, scale=case.weight.scale, bias=case.bias)
    weights |= dict(zip(("x_scale", "x_zero"), case.static, strict=True))

    def compute(x: Tensor) -> Tensor:
        w = weights
        return linear8(x, w["codes"], w["scale"], w["bias"], w["x_scale"], w["x_zero"], **case.input)

    return compute, weights, case.x


CALLS: dict[str, tuple[Callable[..., Call], int]] = {
    "w4": (lambda m: w4_call("W4A16_G128", m, w4.Config(64, 16, 1, 4, 3)), 1),
    "w4 with zero points": (lambda m: w4_call("W4A16_ASYM_G128", m, w4.Config(64, 16, 1, 4, 3)), 1),
    "w4 split": (lambda m: w4_call("W4A16_G128", m, w4.Config(64, 16, 2, 4, 3)), 1),
    "w4 shared, three axes": (lambda m: w4_call("W4A16_G128", m, w4.Config(16, 8, 1, 4, 3, shared=True), (2, 2)), 1),
    "int8": (lambda m: linear8_call("W8A8", m), 2),
    "int8, three axes": (lambda m: linear8_call("W8A8", m, (2, 1)), 2),
    "int8 static with zero point": (lambda m: linear8_call("W8A8_STATIC_ASYM", m), 2),
    "fp8": (lambda m: linear8_call("FP8_DYNAMIC", m), 2),
}


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def changed(t: Tensor) -> Tensor:
    """Other values, in memory of their own."""
    return bits(t).flatten().roll(7).view_as(t).view(t.dtype).clone() if t.dim() else t + 1
