"""`qfx::gated`: an activation function, times the other half of a gated pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels._cuda import on_cuda
from qfx.kernels.quantize_rows import gpu_reason

CASES = [
    ((1,), 64, "silu", True),
    ((7,), 33, "gelu", True),
    ((2, 5), 40, "gelu_tanh", True),
    ((3,), 17, "relu", False),
    ((0,), 24, "silu", True),
    ((4,), 48, "none", False),
    ((2,), 1500, "silu", True),
]
"""(leading dims, channels, function, gated)."""

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
    "none": lambda v: v,
}
"""Functions by name."""


@torch.library.custom_op("qfx::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor | None = None, act: str = "silu") -> Tensor:
    """`y = act(gate) · up`.

    Rounded to gate's dtype behind the function and again behind the product, as models do; `qfx::gated_quantize` rounds
    once. For inference: it has no gradient.

    Args:
        gate: `[..., channels]`, any float dtype; may be half of a wider tensor.
        up: of gate's shape and dtype, or None for `act(gate)` alone.
        act: silu, gelu (with erf), gelu_tanh, relu or none.

    Returns:
        y of gate's shape and dtype.

    Raises:
        KernelError: shapes or dtypes do not fit, or the function is unknown.
    """
    check("gated", gate, up, act)
    return _reference(gate, up, act)


def _reference(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = ACTS[act](gate)
    y = y if up is None else y * up
    return y.clone(memory_format=torch.contiguous_format) if y is gate else y.contiguous()


@gated.register_fake
def _(gate: Tensor, up: Tensor | None = None, act: str = "silu") -> Tensor:
    check("gated", gate, up, act)
    return gate.new_empty(gate.shape)


@on_cuda(gated)
def _(gate: Tensor, up: Tensor | None = None, act: str = "silu") -> Tensor:
    check("gated", gate, up, act)
    if gpu_reason(gate, "", None, None):
        return _reference(gate, up, act)
    from qfx.kernels.gpu.gated import gated as run
    from qfx.kernels.gpu.rowwise import as_rows

    return run(as_rows(gate), None if up is None else as_rows(up), act).view(gate.shape)


def check(op: str, gate: Tensor, up: Tensor | None, act: str) -> None:
    """Raises a KernelError that names the op, if the arguments of a gated product do not fit."""
    if act not in ACTS:
        raise KernelError(f"{op}: no function {act!r}; use one of {', '.join(ACTS)}")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise KernelError(
            f"{op}: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}; give equal ones"
        )
