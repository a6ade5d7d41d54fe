"""The law on a GPU, for whatever body each op has there."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qfx.core.spec import QSpec, parse_scheme
from qfx.kernels import fp8_linear, int8_linear, quantize_rows, wna16_linear, wnaq_linear
from qfx.kernels.quantize_rows import quantize_activation
from tests.kernels import test_fp8_linear, test_int8_linear, test_wna16_linear, test_wnaq_linear
from tests.kernels.gpu.test_gemm8 import lost
from tests.kernels.law import DTYPES, Case, make_case, reference, violation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_sums")]
RUNS = [
    (int8_linear, test_int8_linear.run),
    (fp8_linear, test_fp8_linear.run),
    (wna16_linear, test_wna16_linear.run),
    (wnaq_linear, test_wnaq_linear.run),
]
SIZES = [((1,), 512, 256), ((33,), 1024, 384), ((3, 100), 768, 130)]


def violation_fp8(y: Tensor, case: Case) -> float:
    """The law, and what Hopper drops when it adds products of float8."""
    expected, bound = reference(case)
    flat = case.x.reshape(-1, case.x.shape[-1])
    codes, scale, _ = quantize_activation(flat, case.input["x_grid"], *case.static, case.input["per_tensor"])
    dropped = lost(codes, case.weight.codes, 0) * scale.double() * case.weight.scale.double().reshape(1, -1)
    rounding = 1 + torch.finfo(y.dtype).eps
    return float(((y.double() - expected).abs() / (bound + rounding * dropped.reshape(y.shape))).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "run"), RUNS, ids=lambda v: getattr(v, "__name__", ""))
def test_law(module, run, dtype: torch.dtype) -> None:
    schemes = dict.fromkeys(case[3] for case in module.CASES)
    larger = [(*size, scheme) for size in SIZES for scheme in schemes]
    for shape in (*module.CASES, *larger):
        if module.supports(parse_scheme(shape[3]), shape[1]):  # its group does not divide this size
            continue
        case = make_case(*shape, dtype)
        if module is fp8_linear and case.x.numel():
            assert violation_fp8(run(case.to("cuda")).cpu(), case) <= 1, shape
            continue
        assert violation(run(case.to("cuda")).cpu(), case) <= 1, shape


@pytest.mark.parametrize(("lead", "channels", "grid"), [*quantize_rows.CASES, ((65,), 1000, "int8_narrow")])
def test_quantize_rows(lead: tuple[int, ...], channels: int, grid: str) -> None:
    x = torch.randn(*lead, channels)
    codes, scale = quantize_rows.quantize_rows(x.cuda(), grid)
    spec = QSpec(quantize_rows.named_grid(grid), (1, -1), dynamic=True)
    expected, expected_scale = quantize_rows.quantize_rows(x, grid)
    assert codes.dtype == spec.grid.dtype and torch.allclose(scale.cpu(), expected_scale, rtol=1e-6)
    # a scale that differs in its last bit tips a few ties over
    assert (codes.cpu().float() != expected.float()).float().mean() < 0.01 if x.numel() else codes.numel() == 0
