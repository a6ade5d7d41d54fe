"""`qfx::wna16_linear` against the law."""

from dataclasses import replace

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.qtensor import quantize_scale
from qfx.core.spec import Scheme, parse_scheme
from qfx.kernels.wna16_linear import CASES, supports, wna16_linear
from tests.kernels.law import DTYPES, Case, make_case, opcheck, violation

FP8_WEIGHTS = Scheme(parse_scheme("FP8").weight)


def run(case: Case) -> torch.Tensor:
    w = case.weight
    return wna16_linear(case.x, case.codes, w.scale, w.zero, w.g_idx, case.bias, **case.stored)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [*CASES, ((4,), 33, 17, FP8_WEIGHTS)])
def test_law(shape: tuple, bias: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype, bias=bias)
    assert supports(case.scheme, shape[1]) is None
    assert violation(run(case), case) <= 1


@pytest.mark.parametrize("name", ["W4A16_G8", "W3A16_ASYM_G8", "W8A16_ASYM_G8"])
def test_act_order(name: str) -> None:
    case = make_case((5,), 40, 9, name, act_order=True)
    assert violation(run(case), case) <= 1
    assert case.weight.g_idx is not None
    wrong = replace(case, weight=replace(case.weight, g_idx=case.weight.g_idx.roll(1)))
    assert violation(run(wrong), case) > 1
    narrow = replace(case, weight=replace(case.weight, g_idx=case.weight.g_idx.int()))
    assert torch.equal(run(narrow), run(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_and_layout(dtype: torch.dtype) -> None:
    case = make_case((4,), 40, 8, "W4A16_G8", dtype, peak=6e4)
    assert violation(run(case), case) <= 1
    case = replace(case, x=torch.randn(40, 6).to(dtype).t())
    assert not case.x.is_contiguous() and violation(run(case), case) <= 1


def test_stored_dtypes_of_scale_and_zero() -> None:
    case = make_case((5,), 40, 9, "W4A16_ASYM_G8")
    w = replace(case.weight, scale=case.weight.scale.bfloat16().float())
    case = replace(case, weight=w)
    stored = replace(case, weight=replace(w, scale=w.scale.bfloat16(), zero=w.zero.to(torch.uint8)))
    assert torch.equal(run(stored), run(case))


@pytest.mark.parametrize("name", ["NF4_DQ_G8", "FP4_DQ_CHANNEL"])
def test_quantized_scales(name: str) -> None:
    """As codes, or as what these stand for."""
    case = make_case((5,), 40, 270, name, torch.bfloat16)
    spec = case.weight.spec
    assert spec.scale is not None
    codes, second = quantize_scale(case.weight.scale, spec)
    given = {"scale_scale": second, "scale_block": spec.scale.block[1], **case.stored}
    args = (case.x.requires_grad_(), case.codes, codes, None, None, case.bias)
    out = wna16_linear(*args, **given)
    assert torch.equal(out, run(case)) and violation(out.detach(), case) <= 1 and second.numel() > 1
    opcheck(wna16_linear, args, given)
    out.sum().backward()
    assert torch.allclose(case.x.grad.float(), case.weight.dequantize().sum(0).expand(5, -1), atol=2**-6)


def test_the_law_notices_a_wrong_scale_and_zero() -> None:
    case = make_case((16,), 64, 32, "W4A16_ASYM_G32", torch.bfloat16)
    wrong = replace(case, weight=replace(case.weight, scale=case.weight.scale * (1 + 2**-5)))
    assert violation(run(wrong), case) > 1
    wrong = replace(case, weight=replace(case.weight, zero=case.weight.zero + 1))
    assert violation(run(wrong), case) > 1


@pytest.mark.parametrize("shape", CASES)
def test_opcheck(shape: tuple) -> None:
    case = make_case(*shape)
    args = (case.x, case.codes, case.weight.scale, case.weight.zero, None, case.bias)
    opcheck(wna16_linear, args, case.stored)
    if shape is CASES[0]:
        opcheck(wna16_linear, (case.x.requires_grad_(), *args[1:]), case.stored)


def test_gradient() -> None:
    case = make_case((2, 3), 40, 9, "W4A16_ASYM_G8", act_order=True)
    x, bias = case.x.requires_grad_(), case.bias.requires_grad_()
    g = torch.randn(2, 3, 9)
    run(case).backward(g)
    assert torch.allclose(x.grad, g @ case.weight.dequantize(), atol=1e-6)
    assert torch.allclose(bias.grad, g.sum((0, 1)), atol=1e-6)


def test_refusals() -> None:
    case = make_case((2,), 16, 8, "W4A16_G8")
    w, layout = case.weight, case.stored
    for x, codes, scale, match in (
        (case.x, case.codes[:, :-1], w.scale, "rows of 8"),
        (case.x, w.codes, w.scale, "rows of 8"),
        (case.x[:, :8], case.codes, w.scale, "x has 8 channels"),
        (case.x, case.codes, w.scale[:3], "8 or 1, groups"),
        (case.x, case.codes, w.scale.repeat(1, 2)[:, :3], "do not divide"),
    ):
        with pytest.raises(KernelError, match=match):
            wna16_linear(x, codes, scale, **layout)
    assert "input is quantized" in (supports(parse_scheme("W4A8"), 128) or "")
    assert "does not divide" in (supports(parse_scheme("W4A16"), 96) or "")
