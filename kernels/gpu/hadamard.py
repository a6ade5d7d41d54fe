"""Hadamard transform of rows on the tensor cores, then codes: one read, one write.

A row of D values in blocks of B = P·Q is a matrix `[D/Q, Q]`, and the transform is `(I ⊗ H_P)ᵀ · X · (I ⊗ H_Q)`: two
products with matrices of ±1 and 0, which are exact in any format. So are the values of X where they are half precision,
and the sums are float32. What the second product rounds is the first one's result T, in one of these forms:

- fp16: one float16 under a power of two for each token that keeps every |T| below 2¹⁵: an error of 2⁻¹¹ |T|, an
  eighth of the rounding of a bfloat16 result. What underflows is off by 2⁻²⁵, that is below 2⁻³⁸ P of the token's
  largest |x|;
- split: the sum of two bfloat16, 2⁻¹⁶ |T|; split3: of three, 2⁻²⁴ |T|, and X is split alike if it is float32;
- twice: another kernel, of three products, rounds two results to float16 (`hadamard_registers`); short: another one
  that rounds nothing in between, for blocks of 16 to 128 (`hadamard_blocks`). For compute capability 9.0 and later.

An error u |T| becomes at most `u Σ|x| / √B` over the block, and typically u times the root mean square of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu import rowwise, tune
from qfx.kernels.gpu.gated_quantize import quantize_rows
from qfx.kernels.gpu.launch import INTERPRET, Launcher, capability, interpreted
from qfx.kernels.gpu.rowwise import quantize_tile, round_to, rounded
from qfx.kernels.hadamard_matrix import hadamard_matrix

MAX_SIDE = 256
"""Rows of the left matrix."""


@triton.jit
def _dot(a, b, acc):
    if interpreted:  # its products of bfloat16 are wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _kernel(
    x, left, right, out, scale, x_scale, x_zero, tokens, x_stride,
    D: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, FORM: tl.constexpr, NORM: tl.constexpr,
    STAGES: tl.constexpr,
    KIND: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, REACH: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, ROWS * P)
    q = tl.arange(0, Q)
    at = (p % P * Q)[:, None] + q[None, :]
    h = tl.load(right + (q[:, None] * Q + q[None, :]))
    if left is not None:
        h_left = tl.load(left + (p[:, None] * P + p[None, :]))
    dtype: tl.constexpr = x.dtype.element_ty
    # a block of threads goes on with the next rows: the matrices stay in shared memory
    for turn in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        token = turn * ROWS + (p // P).to(tl.int64)
        mask = (token < tokens)[:, None] & (at < D)
        v = tl.load(x + (token[:, None] * x_stride + at), mask=mask, other=0.0)
        if left is None:
            y = _product_right(v, h, Q, "split3" if dtype == tl.float32 else "plain") * NORM
        else:
            t = tl.zeros([P, Q], tl.float32)
            if dtype == tl.float32:
                rest = v
                for _ in tl.static_range(3):
                    part = rounded(rest, tl.bfloat16)
                    t = _dot(h_left, round_to(part, tl.bfloat16), t)
                    rest -= part
            else:
                t = _dot(h_left, v, t)
            if FORM == "fp16":
                top = tl.max(tl.max(tl.abs(v.to(tl.float32)), 1), 0)
                step = tl.maximum(top.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)  # 2^-100
                t = t * (((254 << 23) - step).to(tl.float32, bitcast=True) * (16384.0 / P))
                factor = step.to(tl.float32, bitcast=True) * (NORM * P / 16384.0)
                y = _product_right(t, h, Q, FORM) * factor
            else:
                y = _product_right(t, h, Q, FORM) * NORM
        y = rounded(y, dtype)
        if KIND == "":
            tl.store(out + (token[:, None] * D + at), round_to(y, dtype), mask=mask)
        else:
            y = tl.reshape(y, [ROWS, P * Q])
            row = turn * ROWS + tl.arange(0, ROWS).to(tl.int64)
            col = tl.arange(0, P * Q)[None, :]
            row_mask = row < tokens
            quantize_tile(
                y, out, scale, x_scale, x_zero, row, row[:, None] * D + col, row_mask[:, None] & (col < D), row_mask,
                tl.max(tl.abs(y), 1), KIND, LO, HI, REACH, CLAMP,
            )  # fmt: skip


@triton.jit
def _product_right(v, h, Q: tl.constexpr, FORM: tl.constexpr):
    """v, rounded or split as FORM says, times the right matrix."""
    y = tl.zeros([v.shape[0], Q], tl.float32)
    if FORM == "plain":
        y = _dot(v, h, y)
    elif FORM == "fp16":
        y = _dot(v.to(tl.float16), h, y)
    else:
        parts: tl.constexpr = 2 if FORM == "split" else 3
        for _ in tl.static_range(parts):
            part = rounded(v, tl.bfloat16)
            y = _dot(round_to(part, tl.bfloat16), h, y)
            v -= part
    return y


@dataclass(frozen=True)
class Plan:
    """How a transform runs.

    Attributes:
        rows: tokens in a block.
        side: rows of one token's matrix, a power of two; the left matrix is `[side, side]`.
        width: its columns, a power of two; the right matrix is `[width, width]`.
        form: what the second product reads, see the module. Of no effect where there is only one. With `twice` and
            `short`, one row and one matrix of all columns are meant.
        warps: of 32 threads.
        per_sm: blocks of threads for each multiprocessor; they share the rows among themselves.
        stages: 1, or the next row is loaded meanwhile.
    """

    rows: int
    side: int
    width: int
    form: str
    warps: int
    per_sm: int = 4
    stages: int = 1


@functools.cache
def plans(columns: int, block: int, tokens: int, dtype: torch.dtype) -> tuple[Plan, ...]:
    """The candidates, the default first; none if a row is not a matrix that the kernel holds.

    Args:
        columns: of a row.
        block: size of the transform.
        tokens: number of rows.
        dtype: of x. All candidates for a dtype are accurate to one rounding of the result, or better.
    """
    shapes = sorted(_shapes(columns, block, tokens, dtype))
    if not shapes:
        return ()

    def plan(shape: tuple[int, ...], warps: float = 1, per_sm: int = 1, stages: int = 0, split: bool = False) -> Plan:
        rows, side, width = shape[-3:]
        size = rows * side * width
        form = "plain" if block <= width else "split3" if dtype == torch.float32 else "split" if split else "fp16"
        spare = 1 if form in ("plain", "fp16") or size < 16384 else 2  # registers
        usual = min(16, max(1, size // 1024)) / spare
        stages = stages or (2 if tokens > 256 and size < 32768 else 1)
        fitting = max(1, min(16, 16384 // size))
        # Triton 3.6 takes the maximum of a token from half of its columns where 8 warps hold two tokens
        most = 4 if rows > 1 else 32
        return Plan(rows, side, width, form, min(most, max(1, int(usual * warps))), fitting * per_sm, stages)

    # float16 has the precision of one float16 result, so it is not what autotuning may choose there
    split = dtype == torch.float16 and shapes[0][-1] * shapes[0][-2] < 32768
    best = functools.partial(plan, shapes[0], split=split)
    if shapes[0][-1] * shapes[0][-2] >= 32768:
        return (best(),)
    found = [best()]
    found += [best(warps=w, stages=n, per_sm=k) for w in (0.5, 1, 2) for n in (1, 2, 3) for k in (1, 2, 3, 4)]
    found += [plan(shape, split=split, per_sm=k) for shape in shapes[1:3] for k in (1, 2)]
    return tuple(dict.fromkeys([*found, plan(shapes[0], split=True)]))


@functools.cache
def plans_in_registers(columns: int, block: int, tokens: int, dtype: torch.dtype) -> tuple[Plan, ...]:
    """More candidates, for compute capability 9.0 and rows that begin at multiples of 16 bytes: first the default."""
    try:
        from qfx.kernels.gpu import hadamard_blocks, hadamard_registers
    except ImportError:  # a Triton without Gluon, or with another one
        return ()
    found: list[Plan] = []
    first = 8 if columns > 8192 else 4
    for warps in (first, *(w for w in (2, 4, 8) if w != first)):
        # blocks of threads for which there are registers, about
        fitting = max(1, 64 // warps * 32 // (columns // warps // 32 + 32))
        for stages in (2, 1):
            for per_sm in dict.fromkeys((max(1, fitting * 3 // 4), max(1, fitting // 2), fitting, 2 * fitting)):
                if tokens >= 64 and hadamard_registers.takes(columns, block, dtype, warps):
                    found.append(Plan(1, columns // 16, 16, "twice", warps, per_sm, stages))
                if tokens >= 64 and hadamard_blocks.takes(columns, block, dtype, warps):
                    found.append(Plan(1, columns // 32, 32, "short", warps, per_sm, stages))
    return tuple(found)


def _run_in_registers(
    plan: Plan, x: Tensor, block: int, x_grid: str, out: Tensor, scale: Tensor, static: tuple[Tensor | None, ...]
) -> None:
    from qfx.kernels.gpu import hadamard_blocks, hadamard_registers

    tokens, columns = x.shape
    how = (columns, block, x_grid, static[0] is None, plan.warps, plan.stages > 1)
    programs = min(tokens, plan.per_sm * _multiprocessors(x.device))
    rest = (out, scale, *static, tokens, x.stride(0) // 2)  # in words of two values
    if plan.form == "twice":
        matrices = hadamard_registers.matrices(columns, block, plan.warps, x.device)
        hadamard_registers.launcher(*how)((programs, 1, 1), x, *matrices, *rest)
    else:
        matrix = hadamard_blocks.matrix(block, x.dtype, x.device)
        hadamard_blocks.launcher(*how)((programs, 1, 1), x, matrix, *rest)


def _shapes(columns: int, block: int, tokens: int, dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    """(cost in products for each value, preference, rows, side, width) of what the kernel can do."""
    most = 8192 if dtype == torch.float32 else 32768
    for width in (16, 32, 64, 128):
        if columns % width or (block % width and width % block):
            continue
        side = triton.next_power_of_2(columns // width)
        if side > MAX_SIDE or side * width > most or hadamard_matrix(max(1, block // width)) is None:
            continue
        if block > width:
            if 128 % block == 0:  # one product is enough
                continue
            side = max(side, 16)
            # 64 rows fill a product of a warp group, and fewer cost as much; one small token keeps few threads busy
            yield max(side, 64) + width + (128 if side * width < 1024 else 0), -side, 1, side, width
            continue
        for rows in (1, 2, 4, 8, 16, 32, 64):
            tile = rows * side
            enough = tile >= (64 if tokens > 512 else 16)
            if enough and (rows == 1 or tile * width <= 8192):
                yield width, rows, rows, side, width


@functools.cache
def _matrices(
    plan: Plan, columns: int, block: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The left matrix `(I ⊗ H_P)ᵀ`, padded with zeros, or None; and the right one."""
    inner = min(block, plan.width)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    core = hadamard_matrix(inner)
    assert core is not None
    right = torch.block_diag(*[core] * (plan.width // inner))
    if block <= plan.width:
        return None, right.to(half).to(device)
    core = hadamard_matrix(block // plan.width)
    assert core is not None
    blocks = torch.block_diag(*[core.t()] * (columns // block))
    left = torch.zeros(plan.side, plan.side)
    left[: len(blocks), : len(blocks)] = blocks
    return left.to(half).to(device), right.to(torch.float16 if plan.form == "fp16" else torch.bfloat16).to(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _launcher(plan: Plan, columns: int, block: int, x_grid: str, dynamic: bool) -> Launcher:
    grid = rowwise.grid_meta(x_grid, dynamic)
    meta = {"D": columns, "ROWS": plan.rows, "P": plan.side, "Q": plan.width, "FORM": plan.form}
    return Launcher(_kernel, **meta, NORM=block**-0.5, STAGES=plan.stages, **grid, num_warps=plan.warps, num_stages=1)


def hadamard(
    x: Tensor,
    block: int,
    x_grid: str = "",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `qfx::hadamard` of x `[tokens, columns]`, which `takes` allows; the plan is chosen if None."""
    tokens, columns = x.shape
    bucket = tune.bucket(tokens)
    options = plans(columns, block, bucket, x.dtype)
    if not options:  # too long a row to hold: transform block by block, then quantize
        y, none = hadamard(x.reshape(-1, block), block)
        y = y.view(tokens, columns)
        return quantize_rows(y, x_grid, x_scale, x_zero) if x_grid else (y, none)
    out = torch.empty((tokens, columns), dtype=rowwise.code_dtype(x_grid, x.dtype), device=x.device)
    scale = torch.empty((tokens, 1) if x_grid else (0,), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return out, scale

    more: tuple[Plan, ...] = ()
    if not INTERPRET and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and capability(x.device) >= 90:
        more = plans_in_registers(columns, block, bucket, x.dtype)

    def run(plan: Plan, x: Tensor) -> None:
        if plan.form in ("twice", "short"):
            _run_in_registers(plan, x, block, x_grid, out, scale, (x_scale, x_zero))
            return
        left, right = _matrices(plan, columns, block, x.dtype, x.device)
        launch = _launcher(plan, columns, block, x_grid, x_scale is None)
        programs = min(-(-tokens // plan.rows), plan.per_sm * _multiprocessors(x.device))
        launch((programs, 1, 1), x, left, right, out, scale, x_scale, x_zero, tokens, x.stride(0))

    if plan is None:
        key = (x_grid or "values", block, rowwise.FLOATS[x.dtype], columns, bucket)
        plan = tune.pick("hadamard", key, (more or options)[0], lambda: options + more, run, x)
        if plan.form in ("twice", "short") and not more:  # chosen for rows that are aligned
            plan = options[0]
    run(plan, x)
    return out, scale


def takes(columns: int, block: int, dtype: torch.dtype) -> str | None:
    """None if the kernel has a plan for rows of so many columns, otherwise the reason why not."""
    if plans(columns, block, 1, dtype) or plans(block, block, 1, dtype):
        return None
    return f"no plan for {columns} columns of {dtype} in blocks of {block}"
