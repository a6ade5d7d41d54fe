"""Row-wise kernels: codes equal to the reference's bit for bit, values within the bounds of the ops' own tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qfx.kernels import gated_quantize as gated_op
from qfx.kernels import hadamard as hadamard_op
from qfx.kernels import norm_quantize as norm_op
from qfx.kernels import quantize_rows as quantize_op
from qfx.kernels.gpu import gated_quantize as gated
from qfx.kernels.gpu import hadamard as had
from qfx.kernels.gpu import norm_quantize as norm
from qfx.kernels.gpu import rowwise
from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.gpu.rowwise import Tile
from qfx.kernels.hadamard import transform
from qfx.kernels.quantize_rows import codes_of
from tests.kernels.law import DTYPES, opcheck
from tests.kernels.test_gated_quantize import halves
from tests.kernels.test_gated_quantize import within as gated_within
from tests.kernels.test_norm_quantize import operands
from tests.kernels.test_norm_quantize import within as norm_within

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
GRIDS = ["int8_narrow", "int8", "int4_narrow", "int4", "int2_narrow", "e4m3", "e5m2"]
SHAPES = [(1, 1), (5, 33), (2, 1000), (7, 64), (0, 16)]
GPU_SHAPES = [(5, 33), (33, 11008), (0, 16)]
"""Few numbers of columns, as kernels are compiled for each; `test_random_shapes_rows` has many tokens of more."""


def equal_codes(got: tuple[Tensor, ...], y: Tensor, grid: str, *static: Tensor | None) -> None:
    """Codes and scales are those of y, which is computed on the CPU."""
    scale, zero = (None if t is None else t.cpu() for t in (*static, None, None)[:2])
    codes, scales = codes_of(y.cpu(), grid, scale, zero)
    assert got[0].dtype == codes.dtype and got[0].shape == codes.shape and got[1].shape == scales.shape
    assert torch.equal(got[1].cpu(), scales)
    assert torch.equal(got[0].cpu().float(), codes.float())


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantize_rows(grid: str, dtype: torch.dtype, device: str) -> None:
    for tokens, columns in SHAPES if device == "cpu" else GPU_SHAPES:
        x = torch.randn(tokens, columns) * 10
        x[tokens // 2 : tokens // 2 + 1] = 0
        x = x.to(dtype).to(device)
        equal_codes(gated.quantize_rows(x, grid), x, grid)


@on_devices
@pytest.mark.parametrize(
    ("grid", "zero"), [("uint8", 77), ("uint8", 0), ("uint4", 15), ("int8", None), ("e4m3", None), ("e5m2", None)]
)
def test_static_scale(grid: str, zero: int | None, device: str) -> None:
    scale = torch.tensor(0.02, device=device)
    point = None if zero is None else torch.tensor(zero, dtype=torch.int32, device=device)
    x = torch.randn(5, 40, device=device) * 3
    x[0, 0], x[0, 1] = 1e30, -1e30  # far out of reach
    equal_codes(gated.quantize_rows(x, grid, scale, point), x, grid, scale, point)


@on_devices
def test_extremes(device: str) -> None:
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        rows = [[info.max, -info.max, 1.0], [info.smallest_normal, -info.smallest_normal, 0.0], [0.0, -0.0, 0.0]]
        x = torch.tensor(rows, dtype=torch.float64).to(dtype).to(device)
        for grid in ("int8_narrow", "e4m3", "e5m2"):
            # float32's own scale is its smallest normal then, and the quotient's remainder underflows
            part = x[::2] if dtype != torch.float16 else x
            equal_codes(gated.quantize_rows(part, grid), part, grid)


@on_devices
@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_the_sign_of_zero(grid: str, device: str) -> None:
    """Float codes of -0, and of what rounds to it, have its bits."""
    x = torch.tensor([[-0.0, 0.0, 3.0, -1.0, -1e-12, 1e-12], [-0.0, 0.0, 0.0, -0.0, 0.0, 0.0]])
    signs = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]], dtype=torch.uint8) * 128
    up = -torch.ones(2, 6)
    for dtype in DTYPES if device == "cpu" else (torch.bfloat16,):
        rows = x.to(dtype).to(device)
        codes, _ = gated.quantize_rows(rows, grid)
        assert torch.equal(codes.cpu().view(torch.uint8) & 128, signs)
        codes, _ = gated.gated_quantize(rows, up.to(dtype).to(device), "none", grid)
        assert torch.equal(codes.cpu().view(torch.uint8) & 128, 128 - signs)
        codes, _ = gated.quantize_rows(rows, grid, torch.tensor(0.5, device=device))
        assert torch.equal(codes.cpu().view(torch.uint8) & 128, signs)


@on_devices
def test_tiles(device: str) -> None:
    """Several tokens in a block, warps that share a token, rows that are read twice."""
    x = torch.randn(11, 300).to(torch.bfloat16).to(device)
    for tile in (Tile(1, 512, 4), Tile(4, 512, 2), Tile(16, 512, 8), Tile(1, 128, 1), Tile(4, 64, 2)):
        equal_codes(gated.gated_quantize(x, None, "none", "int8_narrow", tile=tile), x, "int8_narrow")
        y, _ = gated.gated_quantize(x, None, "relu", "", tile=tile)
        assert torch.equal(y, x.relu())


@on_devices
def test_strided(device: str) -> None:
    wide = torch.randn(6, 100).to(torch.bfloat16).to(device)
    for x in (wide[:, :40], wide[:, 50:83], wide[::2, 3:]):
        assert not x.is_contiguous()
        equal_codes(gated.quantize_rows(x, "int8_narrow"), x, "int8_narrow")


def test_division_is_exact() -> None:
    """The kernels' division, step by step in float64, for all mantissas: equal to the division in float32.

    Products of two float32 are exact in float64; so is the remainder, by Sterbenz.
    """
    for bits in (7, 10):
        mantissas = 1 + torch.arange(2**bits, dtype=torch.float32) / 2**bits
        for reach in (127, 127.5, 448, 57344, 7, 7.5, 1, 1.5, 3, 3.5, 15, 15.5, 31, 31.5, 63, 63.5):
            s = (mantissas / reach)[None, :]
            x = mantissas[:, None]
            r = 1 / s
            q = x * r
            e = (q.double() * s.double() - x.double()).float()
            result = (q.double() - e.double() * r.double()).float()
            assert torch.equal(result, x / s)
            assert not torch.equal(q, x / s)  # a product with the reciprocal is not
    for x, s in ((-0.0, 0.3), (0.0, 0.3), (-0.0, 1.0)):  # float64 rounds none of this
        q = x * s
        e = q * s + -x
        assert math.copysign(1, e * -s + q) == math.copysign(1, x)


@on_devices
def test_ties_of_all_mantissas(device: str) -> None:
    """Every pair of bfloat16 mantissas: of a row's largest value and of another value, at nine exponents."""
    mantissas = 1 + torch.arange(128) / 128
    rows = torch.cat([mantissas * 2.0**-k for k in range(9)]).expand(128, -1)
    x = torch.cat([mantissas[:, None] * 2, rows], 1).to(torch.bfloat16).to(device)
    for grid in GRIDS:
        equal_codes(gated.quantize_rows(x, grid), x, grid)


@on_devices
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(act: str, dtype: torch.dtype, device: str) -> None:
    long = [(3, 53248)] if act == "silu" else []  # rows that are read twice
    for tokens, columns in SHAPES[:4] if device == "cpu" else [*GPU_SHAPES, *long]:
        gate, up = (t.to(device) for t in halves((tokens,), columns, dtype))
        for half in (None, up) if device == "cpu" or dtype == torch.bfloat16 else (up,):
            y, _ = gated.gated_quantize(gate, half, act, "")
            assert gated_within(y.cpu(), gate.cpu(), None if half is None else half.cpu(), act)
            for grid in ("int8_narrow", "e4m3") if device == "cpu" else ("int8_narrow" if half is None else "e4m3",):
                equal_codes(gated.gated_quantize(gate, half, act, grid), y, grid)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("cast_first", [False, True])
def test_norm(center: bool, cast_first: bool, dtype: torch.dtype, device: str) -> None:
    for tokens, columns in SHAPES[1:3] if device == "cpu" else [*GPU_SHAPES, (5, 28672)]:
        x, residual, gain, bias = (t.to(device) for t in operands((tokens,), columns, dtype))
        for extra in (None, residual):
            for grid in (
                ("int8_narrow", "e4m3", "") if device == "cpu" else ("int8_narrow" if extra is None else "e4m3",)
            ):
                rest = (extra, gain, bias if center else None, 1e-5, center, cast_first, grid, None, None, True)
                codes, scale, y, total = norm.norm_quantize(x, *rest)
                if extra is not None:
                    assert torch.equal(total, x + residual)
                read = (x if extra is None else total).cpu()
                assert norm_within(y.cpu(), read, gain.cpu(), bias.cpu() if center else None, 1e-5, center)
                if grid:
                    equal_codes((codes, scale), y, grid)


@on_devices
def test_norm_of_strided_rows_without_gain(device: str) -> None:
    wide = torch.randn(6, 128).to(torch.float16).to(device)
    x, residual = wide[:, :48], wide[:, 64:112]
    codes, scale, y, total = norm.norm_quantize(
        x, residual, None, None, 1e-6, False, True, "int8_narrow", None, None, True, Tile(2, 64, 2)
    )
    assert torch.equal(total, x + residual) and norm_within(y.cpu(), total.cpu(), None, None, 1e-6, False)
    equal_codes((codes, scale), y, "int8_narrow")


def hadamard_bound(x: Tensor, block: int, plan: had.Plan, exact: Tensor) -> Tensor:
    """How far a plan may be from the exact transform: what `kernels/gpu/hadamard.py` derives for its form.

    A tensor core drops up to 2⁻²³ of a partial sum in each addition, P + Q in all; the factor is 4 roundings.
    """
    blocks = x.double().abs().unflatten(-1, (-1, block))
    terms = (blocks.sum(-1, keepdim=True) / block**0.5).expand(blocks.shape).flatten(-2)
    unit = {"plain": 0.0, "short": 0.0, "fp16": 2.0**-11, "twice": 2.0**-10 + 2.0**-22, "split": 2.0**-16}.get(
        plan.form, 2.0**-23
    )
    # of float32 input, three parts are kept in any form
    unit += 2.0**-23 if x.dtype == torch.float32 else 0.0
    lost = {"fp16": plan.side**2 * 2.0**-38, "twice": block**0.5 * 2.0**-38}.get(plan.form, 0.0)
    lost = lost * x.double().abs().amax(-1, keepdim=True)
    info = torch.finfo(x.dtype)
    off = (unit + (plan.side + plan.width + 4) * 2.0**-23) * terms + lost
    return off + info.eps / 2 * (exact.abs() + off) + info.smallest_normal * info.eps


HADAMARDS = [(1, 64, 64), (5, 128, 32), (3, 192, 192), (3, 96, 48), (2, 1024, 1024), (3, 32, 8), (2, 1536, 768)]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard(dtype: torch.dtype, device: str) -> None:
    larger = [(3, 192, 192), (300, 4096, 4096), (700, 8192, 8192), (9, 14336, 14336), (2000, 128, 128), (64, 8192, 64)]
    for tokens, columns, block in HADAMARDS if device == "cpu" else larger:
        x = (torch.randn(tokens, columns) * 10).to(dtype).to(device)
        x[tokens // 2 : tokens // 2 + 1] = 0
        exact = transform(x.double(), block)
        options = had.plans(columns, block, tokens, dtype)
        assert options or had.takes(columns, block, dtype)
        small = {(p.side, p.width, p.form): p for p in reversed(options)}.values()
        # every candidate of one shape and dtype; otherwise those that compute something else
        every = device == "cuda" and dtype == torch.bfloat16 and tokens == 300
        for i, plan in enumerate(options if every else small):
            y, _ = had.hadamard(x, block, plan=plan)
            assert ((y.double() - exact).abs() <= hadamard_bound(x, block, plan, exact)).all(), plan
            if device == "cpu" or i == 0:
                equal_codes(had.hadamard(x, block, "int8_narrow", plan=plan), y, "int8_narrow")


@on_devices
def test_hadamard_goes_on_with_the_next_rows(device: str) -> None:
    """More tokens than blocks of threads, and a last block that is not full."""
    plan = had.Plan(8, 2, 16, "plain", 1, 1, 1)
    x = torch.randn(8 * 200 + 3 if device == "cuda" else 27, 32).to(torch.float16).to(device)
    y, _ = had.hadamard(x, 16, plan=plan)
    exact = transform(x.double(), 16)
    assert ((y.double() - exact).abs() <= hadamard_bound(x, 16, plan, exact)).all()
    equal_codes(had.hadamard(x, 16, "e5m2", plan=plan), y, "e5m2")


@on_devices
@pytest.mark.parametrize("peak", [1e-30, 1e30])
def test_hadamard_of_extreme_values(peak: float, device: str) -> None:
    """The float16 between the products is scaled by the token's own largest value."""
    x = (torch.randn(2, 256) * peak).to(torch.bfloat16).to(device)
    plan = had.plans(256, 256, 2, torch.bfloat16)[0]
    exact = transform(x.double(), 256)
    y, _ = had.hadamard(x, 256, plan=plan)
    assert plan.form == "fp16" and ((y.double() - exact).abs() <= hadamard_bound(x, 256, plan, exact)).all()


@on_devices
def test_hadamard_of_rows_too_long_to_hold(device: str) -> None:
    x = torch.randn(1, 33 * 2048).to(torch.bfloat16).to(device)
    assert not had.plans(x.shape[1], 2048, 1, x.dtype) and had.takes(x.shape[1], 2048, x.dtype) is None
    y, _ = had.hadamard(x, 2048)
    exact = transform(x.double(), 2048)
    plan = had.plans(2048, 2048, 33, x.dtype)[0]
    assert ((y.double() - exact).abs() <= hadamard_bound(x, 2048, plan, exact)).all()
    equal_codes(had.hadamard(x, 2048, "int8_narrow"), y, "int8_narrow")


@pytest.mark.gpu
def test_registered_ops() -> None:
    """What the dispatcher reaches on a GPU: leading dims, strides, dtypes that only the reference takes."""
    for lead, channels, grid in quantize_op.CASES:
        x = (torch.randn(*lead, channels) * 10).cuda()
        equal_codes(quantize_op.quantize_rows(x, grid), x, grid)
        opcheck(quantize_op.quantize_rows, (x, grid))
    x = torch.randn(9, 6, device="cuda").t()
    equal_codes(quantize_op.quantize_rows(x, "int8"), x, "int8")
    assert quantize_op.quantize_rows(x.double(), "int8")[0].shape == x.shape
    for lead, channels, grid, act, both in gated_op.CASES:
        gate, up = (t.cuda() for t in halves(lead, channels, torch.bfloat16))
        half = up if both else None
        y, _ = gated_op.gated_quantize(gate, half, act, "")
        assert gated_within(y.cpu(), gate.cpu(), up.cpu() if both else None, act)
        opcheck(gated_op.gated_quantize, (gate, half, act, grid))
        if grid:
            equal_codes(gated_op.gated_quantize(gate, half, act, grid), y, grid)
    for lead, channels, grid, center, cast_first in norm_op.CASES:
        x, residual, gain, bias = (t.cuda() for t in operands(lead, channels, torch.bfloat16))
        args = (x, residual, gain, bias, 1e-5, center, cast_first, grid)
        codes, scale, y, total = norm_op.norm_quantize(*args, keep_y=True)
        assert torch.equal(total, x + residual) and y.shape == x.shape
        assert norm_within(y.cpu(), total.cpu(), gain.cpu(), bias.cpu(), 1e-5, center)
        opcheck(norm_op.norm_quantize, args)
        if grid:
            equal_codes((codes, scale), y, grid)
    for lead, channels, block, grid in hadamard_op.CASES:
        x = torch.randn(*lead, channels, device="cuda")
        y, _ = hadamard_op.hadamard(x, block)
        assert y.shape == x.shape and torch.allclose(y.double(), transform(x.double(), block), atol=1e-4)
        opcheck(hadamard_op.hadamard, (x, block, grid))
        if grid:
            equal_codes(hadamard_op.hadamard(x, block, grid), y, grid)


def test_candidates() -> None:
    """Candidates are distinct, the default is one, and all of them launch within the limits of a block."""
    for columns in (1, 100, 1024, 4096, 11008, 28672, 53248):
        for tokens in (1, 64, 8192):
            tiles = rowwise.tiles(columns)
            assert len(set(tiles)) == len(tiles) and rowwise.default_tile(columns, tokens).warps <= 32
            assert all(1 <= t.warps <= 32 and t.block <= rowwise.MAX_BLOCK for t in tiles)
    for columns, block in ((4096, 4096), (8192, 8192), (14336, 14336), (8192, 128)):
        plans = had.plans(columns, block, 8192, torch.bfloat16)
        assert plans and len(set(plans)) == len(plans)
        assert all(p.warps <= 32 and p.rows * p.side * p.width >= columns for p in plans)


def test_reasons() -> None:
    x = torch.zeros(2, 4)
    assert rowwise.takes(x, "int8_narrow", None, None) is None and rowwise.takes(x, "", None, None) is None
    assert "float64" in (rowwise.takes(x.double(), "int8", None, None) or "")
    assert "zero point" in (rowwise.takes(x, "uint8", torch.tensor(1.0), None) or "")
    assert "no plan" in (had.takes(65536, 65536, torch.bfloat16) or "")
