"""`qfx::quantize_rows` and the activation half of every linear op."""

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.grid import E4M3, E5M2, Int
from qfx.core.qtensor import dynamic_scale
from qfx.core.spec import QSpec, parse_scheme
from qfx.kernels.quantize_rows import (
    CASES,
    grid_name,
    named_grid,
    quantize_activation,
    quantize_rows,
    supports,
    supports_input,
)
from tests.kernels.law import DTYPES, opcheck


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "grid"), CASES)
def test_equals_core(lead: tuple[int, ...], channels: int, grid: str, dtype: torch.dtype) -> None:
    x = (torch.randn(*lead, channels) * 10).to(dtype)
    spec = QSpec(named_grid(grid), (1, -1), dynamic=True)
    codes, scale = quantize_rows(x, grid)
    expected, zero = dynamic_scale(x, spec)
    assert zero is None and scale.dtype == torch.float32 and torch.equal(scale, expected)
    assert codes.dtype == spec.grid.dtype
    assert torch.equal(codes.float(), spec.grid.encode(x.float() / expected).float())
    # every value is within half a step of its code: for integers half a scale
    if isinstance(spec.grid, Int):
        assert ((codes.float() * scale - x.float()).abs() <= scale * (0.5 + 1e-5 * spec.grid.hi)).all()


@pytest.mark.parametrize(("lead", "channels", "grid"), CASES)
def test_opcheck(lead: tuple[int, ...], channels: int, grid: str) -> None:
    opcheck(quantize_rows, (torch.randn(*lead, channels), grid))


@pytest.mark.parametrize(("grid", "zero"), [("int8", None), ("uint8", 3), ("e4m3", None)])
@pytest.mark.parametrize("lead", [(1,), (1, 1), (4,), (0,)])
def test_static_scales_are_a_copy(lead: tuple[int, ...], grid: str, zero: int | None) -> None:
    """An output that shares memory with an input is none that a custom op may return."""
    for x_scale in (torch.tensor(0.1), torch.tensor([[0.1]])):
        point = None if zero is None else torch.tensor(zero, dtype=torch.int32)
        opcheck(quantize_rows, (torch.randn(*lead, 8), grid, x_scale, point))
        _, scale = quantize_rows(torch.randn(*lead, 8), grid, x_scale, point)
        assert scale.shape == (*lead, 1) and scale.data_ptr() != x_scale.data_ptr()
        assert (scale == 0.1).all() and scale.is_contiguous()


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_the_sign_of_zero(grid: str) -> None:
    codes, _ = quantize_rows(torch.tensor([[-0.0, 0.0, 3.0], [-0.0, 0.0, 0.0]]), grid)
    assert codes.view(torch.uint8)[:, :2].tolist() == [[0x80, 0], [0x80, 0]]


@pytest.mark.parametrize("grid", ["int8_narrow", "e4m3", "e5m2"])
def test_extremes(grid: str) -> None:
    x = torch.tensor([[0.0, 0.0], [6e4, -6e4], [1e-7, 0.0]], dtype=torch.float16)
    codes, scale = quantize_rows(x, grid)
    values = codes.float() * scale
    assert scale[0] == 1 and (values[0] == 0).all()
    assert values.isfinite().all() and torch.allclose(values, x.float(), rtol=1e-6)


def test_non_contiguous() -> None:
    x = torch.randn(9, 6).t()
    got, expected = quantize_rows(x, "int8_narrow"), quantize_rows(x.contiguous(), "int8_narrow")
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, expected, strict=True))


def test_per_tensor_static_and_empty() -> None:
    x = torch.randn(4, 8)
    _, scale, zero = quantize_activation(x, "uint8", None, None, True)
    assert scale.numel() == 1 and zero is not None and zero.dtype == torch.int32
    codes, _, _ = quantize_activation(x, "uint8", torch.tensor(0.01), torch.tensor(3, dtype=torch.int32), False)
    assert codes.dtype == torch.uint8 and codes.max() <= 255
    codes, scale, _ = quantize_activation(x[:0], "int8_narrow", None, None, True)
    assert codes.shape == (0, 8) and scale.item() == 1


def test_names() -> None:
    for grid in (Int(8, narrow=True), Int(8), Int(3, signed=False), E4M3, E5M2):
        assert named_grid(grid_name(grid)) == grid
    for name in ("int9", "uint8_narrow_", "fp8", ""):
        with pytest.raises(KernelError, match="no grid"):
            named_grid(name)


def test_refusals() -> None:
    with pytest.raises(KernelError, match="needs a zero point"):
        quantize_rows(torch.randn(2, 4), "uint8")
    with pytest.raises(KernelError, match="give x_zero"):
        quantize_activation(torch.randn(2, 4), "uint8", torch.tensor(1.0), None, False)
    spec = parse_scheme("W8A8").input
    assert spec is not None and supports(spec) is None and supports_input(spec) is None
    assert "blocks" in (supports_input(QSpec(Int(8), (1, 128), dynamic=True)) or "")
    assert "static" in (supports_input(QSpec(Int(8), (1, -1))) or "")
    assert "not dynamic" in (supports(QSpec(Int(8), (-1, -1))) or "")
