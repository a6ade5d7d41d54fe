"""int8 and fp8 linears by their GPU launches against the law."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from qfx.core.spec import parse_scheme
from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.gpu.linear8 import linear8, refusal
from tests.kernels.law import Case, make_case, violation

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
INT8 = ["W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A8_TENSOR", "W8A4"]
FP8 = ["FP8", "FP8_DYNAMIC", "FP8_E5M2", "FP8_E5M2_DYNAMIC"]


def run(case: Case) -> torch.Tensor:
    assert refusal(case.x, case.codes) is None
    return linear8(case.x, case.codes, case.weight.scale, case.bias, *case.static, **case.input)


@interpreted
@pytest.mark.parametrize("name", INT8 + FP8)
@pytest.mark.parametrize(("lead", "columns", "rows"), [((2, 3), 48, 24), ((1,), 33, 17), ((0,), 16, 8)])
def test_law(lead: tuple[int, ...], columns: int, rows: int, name: str) -> None:
    case = make_case(lead, columns, rows, name)
    assert violation(run(case), case) <= 1


@interpreted
@pytest.mark.parametrize("block", [(1, -1), (-1, -1)])
@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC_ASYM", "FP8_DYNAMIC"])
def test_dynamic_per_tensor_and_asymmetric(name: str, block: tuple[int, int]) -> None:
    scheme = parse_scheme(name)
    assert scheme.input is not None
    scheme = replace(scheme, input=replace(scheme.input, dynamic=True, block=block))
    case = make_case((6,), 40, 17, scheme)
    assert violation(run(case), case) <= 1


@interpreted
def test_a_weight_or_zero_point_that_is_written_to() -> None:
    case = make_case((6,), 48, 16, "W8A8_STATIC_ASYM")
    assert violation(run(case), case) <= 1
    case.weight.codes.neg_()
    assert violation(run(case), case) <= 1
    assert case.static[1] is not None
    case.static[1].add_(9)
    assert violation(run(case), case) <= 1
