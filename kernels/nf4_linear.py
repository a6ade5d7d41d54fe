"""`qfx::nf4_linear`: weights of 4 bits on a table of 16 values (NF4, FP4) times float activations, for the GPU.

A weight is `table[code] · absmax` of its block of 64 columns. `qfx::wna16_linear` computes the same from codes as they
are stored, also with scales that are quantized themselves; here these are float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import CODEBOOKS, Codebook
from qfx.core.qtensor import encode_minmax
from qfx.core.spec import QSpec, Scheme
from qfx.kernels import nibbles
from qfx.kernels._cuda import on_cuda

TABLES = CODEBOOKS
"""Values of the codes 0 to 15, by name."""

CASES = [
    ((16,), 128, 32, 64, "nf4"),
    ((1,), 256, 64, 64, "nf4"),
    ((3,), 192, 33, 64, "fp4_bnb"),
    ((2, 3), 160, 24, 32, "e2m1"),
    ((7,), 256, 17, 128, "nf4"),
    ((0,), 128, 8, 64, "nf4"),
]
"""(leading dims, in_features, out_features, group, table)."""

LAYOUT = "pairs"


@cache
def table(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 16 values of a table.

    Raises:
        KernelError: there is no such table.
    """
    if name not in TABLES:
        raise KernelError(f"nf4_linear: no table {name!r}; use {', '.join(TABLES)}")
    return torch.tensor(TABLES[name], dtype=torch.float32, device=device).to(dtype)


@torch.library.custom_op("qfx::nf4_linear", mutates_args=())
def nf4_linear(
    x: Tensor,
    tiles: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    group: int = 64,
    table_name: str = "nf4",
) -> Tensor:
    """`F.linear(x, w, bias)`, w being the table's values rounded to x's dtype, times `absmax`.

    Args:
        x: `[..., in]`, any float dtype.
        tiles: codes as `prepare` lays them out, uint8 `[row tiles, column tiles, 128, 64]`.
        absmax: float32 `[groups, 128 · row tiles]`.
        bias: `[out]` or None.
        out_features: `out`.
        group: columns of a block: 32, 64 or a multiple of 128, or -1 for one block.
        table_name: one of `TABLES`.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: the tiles do not have as many columns as x, or there is no such table.
    """
    return _reference(x, tiles, absmax, bias, out_features, group, table_name)


def _reference(
    x: Tensor, tiles: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int, group: int, table_name: str
) -> Tensor:
    nibbles.check("nf4_linear", x, tiles)
    w = _weight(tiles, absmax, out_features, x.shape[-1], group, table(table_name, x.device, x.dtype))
    y = F.linear(x.float(), w, None if bias is None else bias.float())
    return y.to(x.dtype)


def _weight(tiles: Tensor, absmax: Tensor, out_features: int, in_features: int, group: int, values: Tensor) -> Tensor:
    """float32 `[out, in]`."""
    codes = nibbles.untile(tiles, LAYOUT, out_features, in_features)
    return nibbles.dequantize_tiles(values.float()[codes.long()], absmax, None, group)


@nf4_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    group: int = 64,
    table_name: str = "nf4",
) -> Tensor:
    nibbles.check("nf4_linear", x, tiles)
    return x.new_empty((*x.shape[:-1], out_features))


@on_cuda(nf4_linear)
def _(
    x: Tensor,
    tiles: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out_features: int,
    group: int = 64,
    table_name: str = "nf4",
) -> Tensor:
    if x.dtype not in (torch.bfloat16, torch.float16):  # tensor cores take no wider floats
        return _reference(x, tiles, absmax, bias, out_features, group, table_name)
    from qfx.kernels.gpu.decode4 import table_decoder
    from qfx.kernels.gpu.w4 import w4

    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values = table(table_name, x.device, x.dtype)
    decoder = table_decoder(TABLES[table_name], x.dtype)
    y = w4(flat, tiles, absmax, None, bias, out_features, group, decoder, table=values)
    return y.view(*x.shape[:-1], out_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, absmax, bias, out_features, group, table_name = inputs
    ctx.save_for_backward(tiles, absmax)
    ctx.sizes, ctx.table = (out_features, x.shape[-1], group), (table_name, x.device, x.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tiles, absmax = ctx.saved_tensors
    # not the cached one: while torch.compile traces this, tensors must be made within it
    (out, columns, group), values = ctx.sizes, table.__wrapped__(*ctx.table)
    w = _weight(tiles, absmax, out, columns, group, values).to(grad.dtype)
    flat = grad.reshape(-1, grad.shape[-1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return (flat @ w).reshape(*grad.shape[:-1], w.shape[1]), None, None, bias_grad, None, None, None


nf4_linear.register_autograd(_backward, setup_context=_setup)


def quantize(w: Tensor, group: int = 64, table_name: str = "nf4") -> tuple[Tensor, Tensor]:
    """Nearest codes of a weight.

    Args:
        w: `[out, in]`; `group` divides `in`.
        group: columns of a block, or -1 for one block.
        table_name: one of `TABLES`.

    Returns:
        Codes uint8 `[out, in]`, and float32 `[out, blocks]`: the largest magnitude of each block, divided by the
        table's largest value; 1 for a block of zeros.

    Raises:
        KernelError: the blocks do not divide the columns, or there is no such table.
    """
    try:
        q = encode_minmax(w, QSpec(Codebook(table_name), (1, group)))
    except ValueError as e:
        raise KernelError(f"nf4_linear: {e}") from None
    return q.codes, q.scale


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    if scheme.input is not None:
        return "nf4_linear: the input is quantized"
    if not isinstance(scheme.weight.grid, Codebook):
        return "nf4_linear: the weight is not on a codebook"
    if g_idx:
        return "nf4_linear: the columns of a group are not neighbours"
    return nibbles.supports_group("nf4_linear", scheme, in_features)


def prepare(codes: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize` gives, in kernel layout: tiles and absmax."""
    return nibbles.tile(codes, LAYOUT), nibbles.pad_scale(absmax, codes.shape[0])


def restore(tiles: Tensor, absmax: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `prepare`."""
    codes = nibbles.untile(tiles, LAYOUT, out_features, in_features)
    return codes, absmax[:, :out_features].t().contiguous()
