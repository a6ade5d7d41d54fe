"""`qfx::fp8_linear` against the law."""

from dataclasses import replace

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.grid import E5M2
from qfx.core.spec import parse_scheme
from qfx.kernels.fp8_linear import CASES, fp8_linear, supports
from tests.kernels.law import DTYPES, Case, make_case, opcheck, violation


def run(case: Case) -> torch.Tensor:
    return fp8_linear(case.x, case.codes, case.weight.scale, case.bias, case.static[0], **case.input)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", CASES)
def test_law(shape: tuple, bias: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype, bias=bias)
    assert supports(case.scheme, shape[1]) is None
    assert violation(run(case), case) <= 1


def test_mixed_formats_and_dynamic_per_tensor() -> None:
    scheme = parse_scheme("FP8_DYNAMIC")
    assert scheme.input is not None
    scheme = replace(scheme, input=replace(scheme.input, grid=E5M2, block=(-1, -1)))
    for lead in ((6,), (2, 3), (0,), ()):
        case = make_case(lead, 33, 17, scheme)
        assert violation(run(case), case) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8", "FP8_E5M2_DYNAMIC"])
def test_extremes_and_layout(dtype: torch.dtype, name: str) -> None:
    case = make_case((4,), 40, 8, name, dtype, peak=6e4)
    assert violation(run(case), case) <= 1
    case = replace(case, x=torch.randn(40, 6).to(dtype).t())
    assert not case.x.is_contiguous() and violation(run(case), case) <= 1


def test_the_law_notices_a_wrong_scale() -> None:
    case = make_case((16,), 64, 32, "FP8", torch.bfloat16)
    wrong = replace(case, weight=replace(case.weight, scale=case.weight.scale * (1 + 2**-6)))
    assert violation(run(wrong), case) > 1
    assert violation(run(replace(case, static=(case.static[0] * 1.1, None))), case) > 1


@pytest.mark.parametrize("shape", CASES)
def test_opcheck(shape: tuple) -> None:
    case = make_case(*shape)
    args = (case.x, case.codes, case.weight.scale, case.bias, case.static[0])
    opcheck(fp8_linear, args, case.input)
    if shape is CASES[0]:
        opcheck(fp8_linear, (case.x.requires_grad_(), *args[1:]), case.input)


def test_gradient_is_straight_through() -> None:
    case = make_case((5,), 33, 17, "FP8_DYNAMIC")
    x = case.x.requires_grad_()
    g = torch.randn(5, 17)
    run(case).backward(g)
    assert torch.allclose(x.grad, g @ case.weight.dequantize(), atol=1e-6)


def test_refusals() -> None:
    case = make_case((2,), 16, 8, "FP8_DYNAMIC")
    with pytest.raises(KernelError, match="x ends in `in`"):
        fp8_linear(case.x, case.codes.view(torch.uint8), case.weight.scale)
    with pytest.raises(KernelError, match="use e4m3 or e5m2"):
        fp8_linear(case.x, case.codes, case.weight.scale, x_grid="int8")
    assert "input is not" in (supports(parse_scheme("W8A8"), 64) or "")
    assert "weight is not" in (supports(parse_scheme("W4AFP8"), 128) or "")
    assert "blocks" in (supports(parse_scheme("FP8_DYNAMIC").with_group(32), 64) or "")
