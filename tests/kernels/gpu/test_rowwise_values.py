"""Norms and gated products that give values: within the bounds of their ops' tests, and not ahead of their inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from qfx.kernels import gated as gated_op
from qfx.kernels import norm as norm_op
from qfx.kernels.gpu import gated, gated_quantize, pdl
from qfx.kernels.gpu import norm_quantize as norm
from tests.kernels.gpu.draws import normal, rows
from tests.kernels.gpu.test_random_shapes_rows import strided
from tests.kernels.gpu.test_random_shapes_w4 import four
from tests.kernels.gpu.test_rowwise import on_devices
from tests.kernels.law import DTYPES, opcheck
from tests.kernels.test_gated import within as gated_within
from tests.kernels.test_gated_quantize import halves
from tests.kernels.test_norm_quantize import operands
from tests.kernels.test_norm_quantize import within as norm_within

BF16 = torch.bfloat16
SHAPES = [(1, 1), (5, 33), (2, 1000), (1, 8192), (0, 16), (pdl.ROOM + 3, 8)]
"""The last has more programs than start the next kernel at once."""
ops = torch.ops.qfx


@on_devices
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(act: str, dtype: torch.dtype, device: str) -> None:
    for tokens, columns in SHAPES:
        gate, up = (t.to(device) for t in halves((tokens,), columns, dtype))
        for half in (None, up):
            y = gated.gated(gate, half, act)
            assert y.shape == gate.shape and y.dtype == dtype and y.is_contiguous()
            assert gated_within(y.cpu(), gate.cpu(), None if half is None else half.cpu(), act), (tokens, columns)


@on_devices
def test_gated_rows_of_different_strides(device: str) -> None:
    wide = torch.randn(6, 4000).to(BF16).to(device)
    gate, up = wide[:, 3:1506], wide[:, 2000:3503].contiguous()
    assert gated_within(gated.gated(gate, up, "silu").cpu(), gate.cpu(), up.cpu(), "silu")
    assert torch.equal(gated.gated(gate, up, "silu"), gated.gated(gate.contiguous(), up, "silu"))
    assert not gated_within(gated.gated(up, gate, "silu").cpu(), gate.cpu(), up.cpu(), "silu")


@on_devices
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gated_rounds_where_the_body_does(dtype: torch.dtype, device: str) -> None:
    """Behind the function and behind the product; where codes are made of the value, it is rounded once."""
    gate, up = (t.to(device) for t in halves((40,), 256, dtype))
    body = F.silu(gate) * up
    same = gated.gated(gate, up, "silu") == body
    once = gated_quantize.gated_quantize(gate, up, "silu", "")[0] == body
    assert same.float().mean() > 0.99 and once.float().mean() < 0.9


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("cast_first", [False, True])
def test_norm(center: bool, cast_first: bool, dtype: torch.dtype, device: str) -> None:
    for tokens, columns in SHAPES:
        x, residual, gain, bias = (t.to(device) for t in operands((tokens,), columns, dtype))
        for extra in (None, residual):
            rest = (extra, gain, bias if center else None, 1e-5, center, cast_first, "", None, None, True)
            codes, scale, y, total = norm.norm_quantize(x, *rest)
            assert codes.numel() == scale.numel() == 0
            assert total.numel() == 0 if extra is None else torch.equal(total, x + residual)
            read = (x if extra is None else total).cpu()
            assert norm_within(y.cpu(), read, gain.cpu(), bias.cpu() if center else None, 1e-5, center)


@pytest.mark.gpu
def test_registered_ops() -> None:
    """What the dispatcher reaches on a GPU: leading dims, strides, dtypes and rows that only the body takes."""
    for lead, channels, act, both in gated_op.CASES:
        gate, up = (t.cuda() for t in halves(lead, channels, BF16))
        half = up if both else None
        assert gated_within(gated_op.gated(gate, half, act), gate, half, act)
        opcheck(gated_op.gated, (gate, half, act))
    for lead, channels, center, cast_first in norm_op.CASES:
        x, residual, gain, bias = (t.cuda() for t in operands(lead, channels, BF16))
        y, total = norm_op.norm(x, residual, gain, bias, 1e-5, center, cast_first)
        assert torch.equal(total, x + residual) and y.shape == x.shape
        assert norm_within(y.cpu(), total.cpu(), gain.cpu(), bias.cpu(), 1e-5, center)
        opcheck(norm_op.norm, (x, residual, gain, bias, 1e-5, center, cast_first))
    for x in (torch.randn(9, 6, device="cuda").t(), torch.randn(2, 40000, device="cuda")):
        assert norm_within(norm_op.norm(x)[0], x, None, None, 1e-6, False)
        assert gated_within(gated_op.gated(x), x, None, "silu")
    x = torch.randn(3, 8, device="cuda").double()
    assert norm_op.norm(x)[0].dtype == gated_op.gated(x, x).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 7, 64, 1000, 4095, 4096, 5120, 8192, 14336, 28672])
def test_random_shapes(columns: int) -> None:
    dtype = DTYPES[columns % 3]
    gain = torch.randn(columns, device="cuda").to(dtype)
    for i, tokens in enumerate(rows(f"values {columns}", 17, columns)):
        x, residual = (strided(normal(tokens, columns, dtype), i + j) for j in (0, 1))
        y, total = ops.norm(x, residual, gain, None, 1e-5, False, i % 2 == 0)
        assert torch.equal(total, x + residual) and norm_within(y, total, gain, None, 1e-5, False), tokens
        two = strided(normal(tokens, 2 * columns, dtype), i)
        gate, up = two[:, :columns], two[:, columns:]
        act = ("silu", "gelu_tanh", "gelu", "relu")[i % 4]
        z = ops.gated(gate, up, act)
        assert gated_within(z, gate, up, act), tokens
    assert torch.equal(ops.gated(gate, up, act), z) and torch.equal(ops.norm(x, residual, gain, None, 1e-5)[1], total)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_no_kernel_runs_ahead_of_its_input(tokens: int) -> None:
    """Products, norms and gated products one behind the other give what they give one at a time.

    The gain is written shortly before the norm each time, as by a compiler that computes 1 + w in the graph.
    """
    k, n = 1024, 4096
    w1, w2 = four(2 * n, k, 128, "quarters", False, False), four(k, n, 128, "quarters", False, False)
    weight = torch.rand(k, device="cuda").to(BF16)
    start, gain = normal(tokens, k, BF16), torch.empty_like(weight)

    def run(apart: bool) -> list[Tensor]:
        def wait(*values: Tensor) -> tuple[Tensor, ...]:
            if apart:
                torch.cuda.synchronize()
            return values

        h, kept = start.clone(), []
        x = torch.zeros_like(h)
        gain.copy_(weight)
        for i in range(6):
            y, h = wait(*ops.norm(h, x, gain, None, 1e-5))
            (two,) = wait(ops.w4a16_linear(y, w1.tiles, w1.scale, None, None, None, 2 * n, 128))
            (z,) = wait(ops.gated(two[:, :n], two[:, n:]))
            torch.add(weight, 1 + i, out=gain)
            (x,) = wait(ops.w4a16_linear(z, w2.tiles, w2.scale, None, None, None, k, 128))
            x = x / x.abs().amax().clamp_min(1e-3) if i == 2 else x
            kept += [y, h, z]
        return kept

    want = run(apart=True)
    assert all(bool(t.float().isfinite().all()) for t in want)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(apart=False), want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(apart=False)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
