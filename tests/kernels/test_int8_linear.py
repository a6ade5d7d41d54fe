"""`qfx::int8_linear` against the law, and its integer product against integers."""

from dataclasses import replace

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.kernels import int8_linear as module
from qfx.kernels.int8_linear import CASES, _chunked_matmul, int8_linear, int_matmul, supports
from tests.kernels.law import DTYPES, Case, make_case, opcheck, violation


def run(case: Case) -> torch.Tensor:
    return int8_linear(case.x, case.codes, case.weight.scale, case.bias, *case.static, **case.input)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", CASES)
def test_law(shape: tuple, bias: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype, bias=bias)
    assert supports(case.scheme, shape[1]) is None
    assert violation(run(case), case) <= 1


@pytest.mark.parametrize("dynamic_block", [(1, -1), (-1, -1)])
@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC_ASYM"])
def test_dynamic_per_tensor_and_asymmetric(name: str, dynamic_block: tuple[int, int]) -> None:
    scheme = parse_scheme(name)
    assert scheme.input is not None
    scheme = replace(scheme, input=replace(scheme.input, dynamic=True, block=dynamic_block))
    for lead in ((6,), (2, 3), (0,), ()):
        case = make_case(lead, 33, 17, scheme)
        assert violation(run(case), case) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_and_layout(dtype: torch.dtype) -> None:
    case = make_case((4,), 40, 8, "W8A8", dtype, peak=6e4)
    assert violation(run(case), case) <= 1
    case = replace(case, x=torch.randn(40, 6).to(dtype).t())
    assert not case.x.is_contiguous() and violation(run(case), case) <= 1


def test_one_input_channel() -> None:
    case = make_case((5,), 1, 7, "W8A8")
    assert violation(run(case), case) <= 1


@pytest.mark.parametrize("factor", [1 + 2**-6, 0.5])
def test_the_law_notices_a_wrong_scale(factor: float) -> None:
    case = make_case((16,), 64, 32, "W8A8", torch.bfloat16)
    wrong = replace(case, weight=replace(case.weight, scale=case.weight.scale * factor))
    assert violation(run(wrong), case) > 1


def test_the_law_notices_a_forgotten_zero_point() -> None:
    case = make_case((16,), 64, 32, "W8A8_STATIC_ASYM")
    wrong = replace(case, static=(case.static[0], torch.zeros((), dtype=torch.int32)))
    assert violation(run(wrong), case) > 1


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 5, 1), (33, 17, 1), (4, 9, 2), (0, 3, 8), (5, 7, 3000), (33, 17, 41)]
)
@pytest.mark.parametrize("matmul", [int_matmul, _chunked_matmul])
def test_integers_are_exact(m: int, n: int, k: int, matmul) -> None:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    b[0] = -128
    if m:
        a[0] = -128
    assert torch.equal(matmul(a, b), (a.double() @ b.double().t()).to(torch.int32))


def test_padding_for_cublas() -> None:
    for m, n, k in ((1, 5, 9), (16, 8, 8), (40, 17, 41)):
        a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        b = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        x, y = module._pad(a, b)
        assert x.shape[0] > 16 and not x.shape[1] % 8 and not y.shape[0] % 8 and x.shape[1] == y.shape[1]
        assert torch.equal(_chunked_matmul(x, y)[:m, :n], _chunked_matmul(a, b))


def test_without_int_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((5,), 1100, 9, "W8A8_STATIC_ASYM")
    fast = run(case)
    monkeypatch.setattr(module, "_int_mm_is_exact", lambda device: False)
    assert torch.equal(run(case), fast)


@pytest.mark.parametrize("shape", CASES)
def test_opcheck(shape: tuple) -> None:
    case = make_case(*shape)
    args = (case.x, case.codes, case.weight.scale, case.bias, *case.static)
    opcheck(int8_linear, args, case.input)
    if shape is CASES[0]:
        opcheck(int8_linear, (case.x.requires_grad_(), *args[1:]), case.input)


def test_gradient_is_straight_through() -> None:
    case = make_case((2, 3), 33, 17, "W8A8")
    assert case.bias is not None
    x, bias = case.x.requires_grad_(), case.bias.requires_grad_()
    g = torch.randn(2, 3, 17)
    int8_linear(x, case.codes, case.weight.scale, bias, **case.input).backward(g)
    assert torch.allclose(x.grad, g @ case.weight.dequantize(), atol=1e-6)
    assert torch.allclose(bias.grad, g.sum((0, 1)), atol=1e-6)


def test_refusals() -> None:
    case = make_case((2,), 16, 8, "W8A8")
    with pytest.raises(KernelError, match="x ends in `in`"):
        int8_linear(case.x[:, :8], case.codes, case.weight.scale)
    with pytest.raises(KernelError, match="use fp8_linear"):
        int8_linear(case.x, case.codes, case.weight.scale, x_grid="e4m3")
    for name, reason in (
        ("W8A16", "not on an integer grid"),
        ("W4A8", "8 bits"),
        ("W8A8_ASYM", "not signed"),
        ("W8A8_G16", "blocks"),
    ):
        assert reason in (supports(parse_scheme(name), 64) or "")
    assert "int32" in (supports(parse_scheme("W8A8"), 2**20) or "")
    grouped = Scheme(case.scheme.weight, QSpec(case.weight.spec.grid, (1, 8), dynamic=True))
    assert "blocks of (1, 8)" in (supports(grouped, 64) or "")
