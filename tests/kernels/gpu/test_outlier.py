"""int8 linears with outliers by their GPU launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.gpu.outliers import outlier_linear, split
from qfx.kernels.int8_outlier_linear import CASES, int8_outlier_linear
from tests.kernels.law import DTYPES
from tests.kernels.test_int8_outlier_linear import make, violation

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_law(shape: tuple, dtype: torch.dtype) -> None:
    o = make(*shape, dtype)
    assert violation(outlier_linear(*o.args), o) <= 1


@interpreted
@pytest.mark.parametrize("channels", [48, 33])
def test_split(channels: int) -> None:
    x = torch.randn(5, 2 * channels)[:, :channels]
    x[:, 7] = float("inf")  # an outlier that would spoil every scale
    columns = torch.tensor([7, 0, 11], dtype=torch.int32)
    inlier = torch.ones(channels, dtype=torch.bool)
    inlier[[7, 0]] = False
    codes, scale, picked = split(x, inlier, columns, 16, torch.float32)
    rest = torch.where(inlier, x, 0)
    assert torch.equal(scale, rest.abs().amax(1, keepdim=True) / 127)
    assert torch.equal(codes, (rest / scale).round().to(torch.int8))
    assert torch.equal(picked[:, :2], x[:, [7, 0]]) and not picked[:, 2:].any()


@interpreted
def test_overflow_and_no_outlier() -> None:
    o = make((9,), 64, 16, 0, 6.0)
    o.x[:, :20] = 100 + torch.arange(20)
    assert torch.allclose(outlier_linear(*o.args), int8_outlier_linear(*o.args), rtol=1e-5, atol=1e-3)
    o = replace(o, threshold=1e6)
    assert violation(outlier_linear(*o.args), o) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [((1,), 4096, 1024), ((70,), 4096, 1000), ((3, 700), 1024, 2048)])
def test_on_gpu(shape: tuple, threshold: float, dtype: torch.dtype) -> None:
    o = make(*shape, 40, threshold, dtype)
    assert violation(int8_outlier_linear(*o.to("cuda").args).cpu(), o) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_in_a_graph(threshold: float) -> None:
    o = make((32,), 1024, 256, 5, threshold, torch.bfloat16)
    moved = o.to("cuda")
    int8_outlier_linear(*moved.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int8_outlier_linear(*moved.args)
    other = make((32,), 1024, 256, 5, threshold, torch.bfloat16).x
    moved.x.copy_(other)
    graph.replay()
    assert violation(out.cpu(), replace(o, x=other)) <= 1
