"""`qfx::wnaq_linear` against the law."""

from dataclasses import replace

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.qtensor import quantize_scale
from qfx.core.spec import parse_scheme
from qfx.kernels import fp8_linear, int8_linear
from qfx.kernels.wnaq_linear import CASES, supports, wnaq_linear
from tests.kernels.law import DTYPES, Case, make_case, opcheck, violation


def run(case: Case) -> torch.Tensor:
    w = case.weight
    tensors = (case.x, case.codes, w.scale, w.zero, w.g_idx, case.bias, *case.static)
    return wnaq_linear(*tensors, **case.stored, **case.input)


# it takes whatever the specialised ops take, too
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [*CASES, *int8_linear.CASES, *fp8_linear.CASES])
def test_law(shape: tuple, bias: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype, bias=bias)
    assert supports(case.scheme, shape[1]) is None
    assert violation(run(case), case) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", ["W8A8", "FP8_DYNAMIC", "W8A8_STATIC_ASYM"])
def test_weights_on_a_codebook(inputs: str, dtype: torch.dtype) -> None:
    """Their scales as codes, or as what these stand for."""
    scheme = replace(parse_scheme("NF4_DQ_G8"), input=parse_scheme(inputs).input)
    case = make_case((5,), 40, 70, scheme, dtype)
    spec = scheme.weight
    assert spec.scale is not None and violation(run(case), case) <= 1
    codes, second = quantize_scale(case.weight.scale, spec)
    args = (case.x, case.codes, codes, None, None, case.bias, *case.static)
    given = {**case.stored, **case.input, "scale_scale": second, "scale_block": spec.scale.block[1]}
    assert torch.equal(wnaq_linear(*args, **given), run(case)) and second.numel() == 2
    opcheck(wnaq_linear, (case.x.requires_grad_(), *args[1:]), given)


@pytest.mark.parametrize("name", ["W4A8_G8", "W3A8_ASYM_G8"])
def test_act_order(name: str) -> None:
    case = make_case((5,), 40, 9, name, act_order=True)
    assert violation(run(case), case) <= 1


def test_dynamic_asymmetric_and_per_tensor() -> None:
    scheme = parse_scheme("W4A8_G8_STATIC_ASYM")
    assert scheme.input is not None
    for block in ((1, -1), (-1, -1)):
        dynamic = replace(scheme, input=replace(scheme.input, dynamic=True, block=block))
        for lead in ((6,), (2, 3), (0,), ()):
            case = make_case(lead, 40, 17, dynamic)
            assert violation(run(case), case) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["W4A8_G8", "W4A8_G8_STATIC_ASYM"])
def test_extremes_and_layout(dtype: torch.dtype, name: str) -> None:
    case = make_case((4,), 40, 8, name, dtype, peak=6e4)
    assert violation(run(case), case) <= 1
    case = replace(case, x=torch.randn(40, 6).to(dtype).t())
    assert not case.x.is_contiguous() and violation(run(case), case) <= 1


def test_the_law_notices_a_wrong_scale() -> None:
    case = make_case((16,), 64, 32, "W4A8_G32_STATIC", torch.bfloat16)
    wrong = replace(case, weight=replace(case.weight, scale=case.weight.scale * (1 + 2**-6)))
    assert violation(run(wrong), case) > 1
    assert violation(run(replace(case, static=(case.static[0] * 1.1, None))), case) > 1


@pytest.mark.parametrize("shape", CASES)
def test_opcheck(shape: tuple) -> None:
    case = make_case(*shape)
    args = (case.x, case.codes, case.weight.scale, case.weight.zero, None, case.bias, *case.static)
    opcheck(wnaq_linear, args, {**case.stored, **case.input})
    if shape is CASES[0]:
        opcheck(wnaq_linear, (case.x.requires_grad_(), *args[1:]), {**case.stored, **case.input})


def test_gradient_is_straight_through() -> None:
    case = make_case((5,), 40, 17, "W4A8_ASYM_G8")
    x = case.x.requires_grad_()
    g = torch.randn(5, 17)
    run(case).backward(g)
    assert torch.allclose(x.grad, g @ case.weight.dequantize(), atol=1e-6)


def test_refusals() -> None:
    case = make_case((2,), 16, 8, "W4A8_G8")
    with pytest.raises(KernelError, match="x has 8 channels"):
        wnaq_linear(case.x[:, :8], case.codes, case.weight.scale, **case.stored)
    with pytest.raises(KernelError, match="no grid 'int9'"):
        wnaq_linear(case.x, case.codes, case.weight.scale, **case.stored, x_grid="int9")
    assert "not quantized" in (supports(parse_scheme("W4A16"), 128) or "")
    assert "does not divide" in (supports(parse_scheme("W4A8"), 96) or "")
