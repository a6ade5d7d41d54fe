"""Every GPU op run again, in CUDA graphs, on other streams, and past 2^31 elements: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qfx.kernels import nf4_linear
from tests.kernels import test_int8_outlier_linear as outlier
from tests.kernels.gpu.draws import DEVICE, codes8, normal
from tests.kernels.gpu.test_random_shapes import BF16, E4M3, F32, INT8, gemm_case
from tests.kernels.gpu.test_random_shapes_w4 import four

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_sums")]
ops = torch.ops.qfx
Output = Tensor | tuple[Tensor, ...]


@dataclass
class Run:
    """A call and the inputs that change between calls."""

    call: Callable[[], Output]
    changing: list[Tensor]
    changes: int = 0

    def __call__(self) -> list[Tensor]:
        out = self.call()
        return [out] if isinstance(out, Tensor) else list(out)

    def change(self) -> None:
        """Other values, in place: tokens and channels in another order, one channel new, one of several tokens zero."""
        self.changes += 1
        for t in self.changing:
            bits = t.view(torch.uint8) if t.element_size() == 1 else t
            bits.copy_(bits.flip(0).roll(3, -1))
            bits[:, self.changes] = 40 + self.changes  # as a code of float8: about a quarter
            if len(t) > 1:
                bits[0] = 0


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True) if x.numel())


def _gemm(m: int, n: int, k: int, dtype: torch.dtype) -> Run:
    g = gemm_case(m, n, k, dtype, dtype, 4, False)
    op = ops.int8_gemm if dtype == INT8 else ops.fp8_gemm
    return Run(lambda: op(*g), [g.x])


def _linear(m: int, n: int, k: int, grid: str, static: bool = False) -> Run:
    x, w = normal(m, k, BF16), codes8(n, k, E4M3 if grid == "e4m3" else INT8)
    scale, bias = torch.rand(n, device=DEVICE) / k, torch.randn(n, device=DEVICE).to(BF16)
    x_scale = torch.tensor(0.02, device=DEVICE) if static else None
    zero = torch.tensor(77, dtype=torch.int32, device=DEVICE) if static else None
    if grid == "e4m3":
        return Run(lambda: ops.fp8_linear(x, w, scale, bias, x_scale, grid), [x])
    return Run(lambda: ops.int8_linear(x, w, scale, bias, x_scale, zero, grid), [x])


def _four(m: int, n: int, k: int, group: int, form: str) -> Run:
    layout = {"w4a16": "quarters", "nf4": "pairs", "int8_narrow": "halves", "e4m3": "fours"}[form]
    values = nf4_linear.table("nf4", torch.device(DEVICE), BF16) if form == "nf4" else None
    zeros = form == "w4a16"
    f = four(n, k, group, layout, zeros, form in ("int8_narrow", "e4m3"), values)
    x, bias = normal(m, k, BF16), torch.randn(n, device=DEVICE).to(BF16)
    order = torch.randperm(k, device=DEVICE).to(torch.int32)
    if form == "w4a16":
        return Run(lambda: ops.w4a16_linear(x, f.tiles, f.scale, f.zero, order, bias, n, group), [x])
    if form == "nf4":
        return Run(lambda: ops.nf4_linear(x, f.tiles, f.scale, bias, n, group, "nf4"), [x])
    return Run(lambda: ops.w4a8_linear(x, f.tiles, f.scale, None, None, None, bias, n, group, form), [x])


def _four_gemm(m: int, n: int, k: int, dtype: torch.dtype) -> Run:
    f = four(n, k, 128, "halves" if dtype == INT8 else "fours", False, True)
    x, scale = codes8(m, k, dtype), torch.rand(m, 1, device=DEVICE)
    return Run(lambda: ops.w4a8_gemm(x, scale, f.tiles, f.scale, None, None, None, n, 128, BF16), [x])


def _outlier(m: int, threshold: float) -> Run:
    with torch.device(DEVICE):
        o = outlier.make((m,), 1024, 384, 5, threshold, BF16)
    return Run(lambda: ops.int8_outlier_linear(*o.args), [o.x])


def _rows(op: str, m: int) -> Run:
    x, other = normal(m, 4096, BF16), normal(m, 4096, BF16)
    gain = torch.randn(4096, device=DEVICE).to(BF16)
    calls: dict[str, Callable[[], Output]] = {
        "quantize": lambda: ops.quantize_rows(x, "int8_narrow"),
        "gated": lambda: ops.gated_quantize(x, other, "silu", "e4m3"),
        "norm": lambda: ops.norm_quantize(x, other, gain, None, 1e-5, False, True, "int8_narrow", None, None, True),
        "hadamard": lambda: ops.hadamard(x, 4096, "int8_narrow"),
        "gated values": lambda: ops.gated(x, other, "silu"),
        "norm values": lambda: ops.norm(x, other, gain, None, 1e-5),
    }
    return Run(calls[op], [x, other])


RUNS: dict[str, Callable[[], Run]] = {
    "int8_gemm, split": lambda: _gemm(5, 384, 8192, INT8),
    "int8_gemm, many": lambda: _gemm(1500, 528, 1024, INT8),
    "fp8_gemm, split": lambda: _gemm(5, 384, 8192, E4M3),
    "fp8_gemm, many": lambda: _gemm(1500, 528, 1024, E4M3),
    "int8_linear, split": lambda: _linear(3, 512, 4096, "int8_narrow"),
    "int8_linear, static": lambda: _linear(700, 512, 1024, "uint8", static=True),
    "fp8_linear, split": lambda: _linear(3, 512, 4096, "e4m3"),
    "fp8_linear, many": lambda: _linear(700, 512, 1024, "e4m3"),
    "w4a16, split": lambda: _four(3, 512, 8192, 128, "w4a16"),
    "w4a16, middle": lambda: _four(100, 512, 1024, 64, "w4a16"),
    "w4a16, many": lambda: _four(1500, 512, 1024, 128, "w4a16"),
    "nf4, split": lambda: _four(20, 512, 8192, 64, "nf4"),
    "nf4, many": lambda: _four(1500, 512, 1024, 64, "nf4"),
    "w4a8 int8, split": lambda: _four(3, 512, 8192, 128, "int8_narrow"),
    "w4a8 e4m3, split": lambda: _four(20, 512, 8192, -1, "e4m3"),
    "w4a8 int8, many": lambda: _four(1500, 512, 1024, 32, "int8_narrow"),
    "w4a8_gemm int8": lambda: _four_gemm(3, 384, 8192, INT8),
    "w4a8_gemm e4m3": lambda: _four_gemm(300, 384, 2048, E4M3),
    "outliers, static": lambda: _outlier(20, 0.0),
    "outliers, dynamic": lambda: _outlier(300, 6.0),
    **{
        f"{op}, {m} rows": (lambda op=op, m=m: _rows(op, m))
        for op in ("quantize", "gated", "norm", "hadamard", "gated values", "norm values")
        for m in (3, 700)
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_again_in_a_graph_and_on_a_stream(name: str) -> None:
    run = RUNS[name]()
    first = run()
    assert all(equal(run(), first) for _ in range(5))
    assert all(bool(t.float().isfinite().all()) for t in first)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = [run() for _ in range(2)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(equal(out, first) for out in aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    before = first
    for _ in range(3):
        run.change()
        graph.replay()
        now = [t.clone() for t in out]
        assert equal(now, run()) and not equal(now, before)
        before = now
    graph.replay()  # the same inputs once more: counters of split sums were left at zero
    assert equal(out, before)


def test_rows_past_two_to_the_31() -> None:
    columns = 8192
    m = 2**31 // (2 * columns) + 5
    two = torch.zeros(m, 2 * columns, dtype=BF16, device=DEVICE)
    some = torch.tensor([0, 1, m - 2, m - 1], device=DEVICE)
    two[some] = torch.randn(4, 2 * columns, device=DEVICE).to(BF16)
    gate, up = two[:, :columns], two[:, columns:]
    gain = torch.randn(columns, device=DEVICE).to(BF16)

    def check(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, times: int = 1) -> None:
        large, small = call(*inputs), call(*(t[some].repeat(times, 1) for t in inputs))
        assert equal([t[some] for t in large if t.numel()], [t[:4] for t in small if t.numel()])
        assert not large[0][2:-2].any()

    check(lambda g, u: ops.gated_quantize(g, u, "silu", "int8_narrow"), gate, up)
    check(lambda x: ops.quantize_rows(x, "int8_narrow"), two)
    check(lambda x, r: ops.norm_quantize(x, r, gain, None, 1e-5, False, True, "int8_narrow"), gate, up)
    check(lambda x: ops.hadamard(x, 128, "int8_narrow"), two, times=32)  # fewer rows take another kernel
    check(lambda g, u: (ops.gated(g, u, "silu"),), gate, up)
    check(lambda x, r: ops.norm(x, r, gain), gate, up)


@pytest.mark.parametrize("family", ["int8", "w4a8"])
def test_outputs_past_two_to_the_31(family: str) -> None:
    m, n, k = 70001, 30720, 16 if family == "int8" else 128
    x = torch.randint(-8, 9, (m, k), device=DEVICE).to(INT8)
    some = torch.tensor([0, 1, m // 2, m - 2, m - 1], device=DEVICE)
    if family == "int8":
        w, one = torch.randint(-8, 9, (n, k), device=DEVICE).to(INT8), torch.ones(1, device=DEVICE)
        out = ops.int8_gemm(x, one, w, one, None, None, "", BF16)
        exact = x[some].double() @ w.double().t()
    else:
        f = four(n, k, 128, "halves", False, True)
        one = torch.ones(m, 1, device=DEVICE)
        out = ops.w4a8_gemm(x, one, f.tiles, f.scale, None, None, None, n, 128, BF16)
        exact = x[some].double() @ f.w.t()
    assert torch.equal(out[some], exact.to(F32).to(BF16))
    assert bool(out[-3000:].isfinite().all())
