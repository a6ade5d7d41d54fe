"""Which kernel computes a quantized linear, and in which layout it reads the weight.

An op of `qfx.kernels` reads the weight as it is stored. A kernel of this table reads it in a layout of its own, which
`prepare` makes and `restore` takes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Codebook, Int
from qfx.core.qtensor import quantize_scale
from qfx.core.spec import Scheme, scheme_label
from qfx.kernels import (
    fp8_linear,
    int8_linear,
    nf4_linear,
    nibbles,
    w4a8_linear,
    w4a16_linear,
    wna16_linear,
    wnaq_linear,
    wxa16_linear,
)
from qfx.kernels.pack import pack, unpack
from qfx.kernels.quantize_rows import grid_name

Stored = Mapping[str, Tensor | None]
"""A weight as `qfx.kernels.pack.store` gives it (`codes`, `scale`, `zero`, `g_idx`, `scale_scale`), or in a kernel's
layout."""


class Kernel(Protocol):
    """A linear over a weight in a layout of its own."""

    def supports(self, scheme: Scheme, in_features: int, out_features: int, g_idx: bool) -> str | None:
        """None if the kernel computes such a linear, otherwise the reason why not."""
        ...

    def prepare(self, stored: Stored, scheme: Scheme, in_features: int) -> Stored:
        """The weight, its scales in float32 (`plain_scale`), in the kernel's layout; shapes depend on shapes only."""
        ...

    def restore(self, prepared: Stored, scheme: Scheme, in_features: int, out_features: int) -> Stored:
        """What `prepare` was given, bit for bit."""
        ...

    def settings(self, scheme: Scheme, in_features: int, out_features: int) -> tuple[Any, ...]:
        """What `call` needs beside tensors: plain values, found once."""
        ...

    def call(
        self,
        x: Tensor,
        prepared: Sequence[Tensor | None],
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero: Tensor | None,
        *settings: Any,
    ) -> Tensor:
        """`[..., in]` to `[..., out]`; `prepared` has the values of `prepare` in their order."""
        ...


class W4A16:
    """`qfx::w4a16_linear`: weights of up to 4 bits, float activations."""

    ops: Any = w4a16_linear

    def supports(self, scheme: Scheme, in_features: int, out_features: int, g_idx: bool) -> str | None:
        """As `Kernel` says."""
        return self.ops.supports(scheme, in_features, g_idx)

    def prepare(self, stored: Stored, scheme: Scheme, in_features: int) -> Stored:
        """As `Kernel` says."""
        return self.ops.prepare(dict(stored), **self._form(scheme), in_features=in_features)

    def restore(self, prepared: Stored, scheme: Scheme, in_features: int, out_features: int) -> Stored:
        """As `Kernel` says."""
        sizes = {"in_features": in_features, "out_features": out_features}
        stored = self.ops.restore(dict(prepared), **self._form(scheme), **sizes)
        if scheme.weight.block[0] == -1:  # the kernel has one scale for each row
            stored |= {key: t[:1] for key in ("scale", "zero") if (t := stored[key]) is not None}
        return stored

    def settings(self, scheme: Scheme, in_features: int, out_features: int) -> tuple[Any, ...]:
        """As `Kernel` says."""
        return out_features, scheme.weight.block[1]

    def call(self, x: Tensor, prepared: Sequence[Tensor | None], bias: Tensor | None, *rest: Any) -> Tensor:
        """As `Kernel` says."""
        _input_scale, _input_zero, *settings = rest
        return torch.ops.qfx.w4a16_linear(x, *prepared, bias, *settings)

    def _form(self, scheme: Scheme) -> dict[str, Any]:
        grid = scheme.weight.grid
        return {"bits": grid.bits, "signed": isinstance(grid, Int) and grid.signed}


class WxA16(W4A16):
    """`qfx::wxa16_linear`: weights of 2, 3 or 8 bits, float activations."""

    ops = wxa16_linear

    def call(self, x: Tensor, prepared: Sequence[Tensor | None], bias: Tensor | None, *rest: Any) -> Tensor:
        """As `Kernel` says."""
        _input_scale, _input_zero, *settings = rest
        return torch.ops.qfx.wxa16_linear(x, *prepared, bias, *settings)


class W4A8(W4A16):
    """`qfx::w4a8_linear`: the same with activations of 8 bits, quantized for each token."""

    ops = w4a8_linear

    def prepare(self, stored: Stored, scheme: Scheme, in_features: int) -> Stored:
        """As `Kernel` says."""
        scale = stored["scale"]
        assert scale is not None
        second = quantize_scale(scale, scheme.weight)[1] if _in_multiples(scheme) else None
        return super().prepare({**stored, "second": second}, scheme, in_features)

    def settings(self, scheme: Scheme, in_features: int, out_features: int) -> tuple[Any, ...]:
        """As `Kernel` says."""
        assert scheme.input is not None
        return out_features, scheme.weight.block[1], grid_name(scheme.input.grid)

    def call(self, x: Tensor, prepared: Sequence[Tensor | None], bias: Tensor | None, *rest: Any) -> Tensor:
        """As `Kernel` says."""
        _input_scale, _input_zero, *settings = rest
        return torch.ops.qfx.w4a8_linear(x, *prepared, bias, *settings)

    def _form(self, scheme: Scheme) -> dict[str, Any]:
        assert scheme.input is not None
        return {**super()._form(scheme), "x_grid": grid_name(scheme.input.grid)}


def _in_multiples(scheme: Scheme) -> bool:
    """Whether codes times what their scales are multiples by fit in int8, and a product sums integers of whole rows."""
    w, x = scheme.weight, scheme.input
    if w.scale is None or w.scale.block != (1, -1) or x is None or not isinstance(x.grid, Int) or not x.grid.signed:
        return False
    few = all(isinstance(grid, Int) and grid.bits <= 4 for grid in (w.grid, w.scale.grid))
    return few and w.block[0] == 1 and w.block[1] > 0 and w.block[1] % nibbles.TILE == 0


class NF4:
    """`qfx::nf4_linear`: weights of 4 bits on a codebook, float activations."""

    def supports(self, scheme: Scheme, in_features: int, out_features: int, g_idx: bool) -> str | None:
        """As `Kernel` says."""
        return nf4_linear.supports(scheme, in_features, g_idx)

    def prepare(self, stored: Stored, scheme: Scheme, in_features: int) -> Stored:
        """As `Kernel` says."""
        codes, scale = stored["codes"], stored["scale"]
        assert codes is not None and scale is not None
        tiles, absmax = nf4_linear.prepare(unpack(codes, 4, in_features, signed=False), scale)
        return {"tiles": tiles, "absmax": absmax}

    def restore(self, prepared: Stored, scheme: Scheme, in_features: int, out_features: int) -> Stored:
        """As `Kernel` says."""
        tiles, absmax = prepared["tiles"], prepared["absmax"]
        assert tiles is not None and absmax is not None
        codes, scale = nf4_linear.restore(tiles, absmax, out_features, in_features)
        if scheme.weight.block[0] == -1:  # the kernel has one scale for each row
            scale = scale[:1]
        return {"codes": pack(codes, 4), "scale": scale, "zero": None, "g_idx": None}

    def settings(self, scheme: Scheme, in_features: int, out_features: int) -> tuple[Any, ...]:
        """As `Kernel` says."""
        assert isinstance(scheme.weight.grid, Codebook)
        return out_features, scheme.weight.block[1], scheme.weight.grid.name

    def call(self, x: Tensor, prepared: Sequence[Tensor | None], bias: Tensor | None, *rest: Any) -> Tensor:
        """As `Kernel` says."""
        _input_scale, _input_zero, *settings = rest
        return torch.ops.qfx.nf4_linear(x, *prepared, bias, *settings)


KERNELS: dict[str, Kernel] = {
    "wxa16_linear": WxA16(),
    "w4a16_linear": W4A16(),
    "w4a8_linear": W4A8(),
    "nf4_linear": NF4(),
}
"""By preference: the first that supports a linear computes it."""

OPS: dict[str, Any] = {
    "int8_linear": int8_linear,
    "fp8_linear": fp8_linear,
    "wna16_linear": wna16_linear,
    "wnaq_linear": wnaq_linear,
}
"""By preference, too; each reads the weight as it is stored."""
GPU_OPS = ("int8_linear", "fp8_linear")
"""Those that have a GPU kernel."""


def choose_op(scheme: Scheme, in_features: int, g_idx: bool = False) -> str:
    """The name of the op that computes a linear of this scheme; KernelError with every op's reason if none does."""
    reasons = {name: op.supports(scheme, in_features, g_idx) for name, op in OPS.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    why = "; ".join(reason for reason in reasons.values() if reason)
    raise KernelError(f"lower: no op computes {scheme_label(scheme)} on {in_features} channels ({why})")


def choose_kernel(scheme: Scheme, in_features: int, out_features: int, g_idx: bool = False) -> tuple[str, str]:
    """The name of the kernel, or op, that computes a linear fastest on a CUDA device, and why it is that one.

    Raises:
        KernelError: no op computes the scheme.
    """
    op = choose_op(scheme, in_features, g_idx)
    refusals = {n: k.supports(scheme, in_features, out_features, g_idx) for n, k in KERNELS.items()}
    if (name := next((n for n, reason in refusals.items() if reason is None), None)) is not None:
        return name, "a GPU kernel with a weight layout of its own"
    if op in GPU_OPS:
        return op, "a GPU kernel that reads the weight as it is stored"
    return op, "; ".join(["PyTorch ops: no GPU kernel takes it", *(reason for reason in refusals.values() if reason)])
