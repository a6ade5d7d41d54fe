"""The helpers of the random tests: what the law says of values out of range, and that changes are changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.draws import bound, worst

F16, INF = torch.float16, math.inf


def violation(out: float, y: float, dtype: torch.dtype = F16, more: float = 0.0) -> float:
    got, exact = torch.tensor([out]).to(dtype), torch.tensor([y], dtype=torch.float64)
    return worst(got, exact, bound(exact, exact.abs(), 4, dtype, more))


@pytest.mark.parametrize("sign", [1, -1])
def test_values_out_of_range(sign: int) -> None:
    for y in (65520.0, 65536.0, 70000.0, 1e30):
        assert violation(sign * INF, sign * y) <= 1
        assert violation(-sign * INF, sign * y) == INF
        assert violation(math.nan, sign * y) == INF
    assert violation(sign * 65504.0, sign * 65504.0) <= 1 and violation(sign * 65504.0, sign * 70000.0) > 1
    assert violation(sign * INF, sign * 65400.0) > 1 and violation(sign * INF, 0.0) > 1
    assert violation(sign * INF, sign * 65400.0, more=200.0) <= 1  # where the bound reaches beyond the range
    for dtype in (torch.bfloat16, torch.float32):
        largest = torch.finfo(dtype).max
        assert violation(sign * INF, sign * 2.0**128, dtype) <= 1 < violation(sign * INF, sign * 0.9 * largest, dtype)


@pytest.mark.parametrize("start", [torch.zeros, torch.ones, torch.randn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_every_change_gives_other_inputs(dtype: torch.dtype, start) -> None:
    pytest.importorskip("triton")
    from tests.kernels.gpu.test_random_runs import Run

    for rows in (1, 2, 3, 7):
        x = start(rows, 16).to(dtype)
        run, seen = Run(lambda x=x: x, [x]), [x.float()]
        for _ in range(3):
            run.change()
            now: Tensor = x.float()
            assert now.isfinite().all() and not any(torch.equal(now, before) for before in seen)
            assert now.any(1).sum() == max(1, rows - 1)  # one of several tokens is zero
            seen.append(now)
