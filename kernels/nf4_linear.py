"""`qfx::nf4_linear`: weights of 4 bits on a table of 16 values (NF4, FP4) times float activations, for the GPU.

A weight is `table[code] · absmax` of its block of 64 columns. QLoRA (Dettmers et al. 2023, arXiv 2305.14314) §3 and
appendix E give NF4's table and the double quantization of `absmax`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels import nibbles

TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}  # fmt: skip
"""Values of the codes 0 to 15. `fp4` is bitsandbytes' table, `e2m1` that of the OCP microscaling formats."""

CASES = [
    ((16,), 128, 32, 64, "nf4"),
    ((1,), 256, 64, 64, "nf4"),
    ((3,), 192, 33, 64, "fp4"),
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


@nf4_linear.register_kernel("cuda")
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
        table's largest value.

    Raises:
        KernelError: the blocks do not divide the columns, or there is no such table.
    """
    if group > 0 and w.shape[1] % group:
        raise KernelError(f"nf4_linear: blocks of {group} do not divide {w.shape[1]} columns")
    values = table(table_name, w.device)
    blocks = w.float().unflatten(1, (-1, w.shape[1] if group < 0 else group))
    absmax = blocks.abs().amax(-1) / values.abs().max()
    # the midpoints between neighbouring values decide; codes of equal values (0 and -0) are both right
    ordered, index = values.sort(stable=True)
    normal = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(-1)
    place = torch.bucketize(normal.flatten(1), (ordered[1:] + ordered[:-1]) / 2)
    return index[place].to(torch.uint8), absmax


def prepare(codes: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize` gives, in kernel layout: tiles and absmax."""
    return nibbles.tile(codes, LAYOUT), nibbles.pad_scale(absmax, codes.shape[0])


def restore(tiles: Tensor, absmax: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `prepare`."""
    codes = nibbles.untile(tiles, LAYOUT, out_features, in_features)
    return codes, absmax[:, :out_features].t().contiguous()
