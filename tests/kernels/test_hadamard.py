"""`qfx::hadamard` against products with the matrix in float64, and the matrices."""

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.kernels.hadamard import CASES, hadamard, supports, transform
from qfx.kernels.hadamard_matrix import core_order, hadamard_matrix
from qfx.kernels.quantize_rows import codes_of
from tests.kernels.law import DTYPES, U32, opcheck

ORDERS = [1, 2, 8, 12, 20, 24, 28, 36, 40, 44, 60, 68, 76, 84, 104, 108, 140, 148]


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_hadamard(order: int) -> None:
    h = hadamard_matrix(order)
    assert h is not None and (h.abs() == 1).all()
    assert torch.equal(h @ h.t(), order * torch.eye(order))


def test_orders() -> None:
    assert [core_order(n) for n in (1, 4096, 12, 96, 14336, 5120, 52, 104)] == [1, 1, 12, 12, 28, 20, None, 104]
    for order in (0, -4, 3, 6, 10, 11008):
        assert core_order(order) is None and hadamard_matrix(order) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "block", "grid"), CASES)
def test_equals_the_product(lead: tuple[int, ...], channels: int, block: int, grid: str, dtype: torch.dtype) -> None:
    x = (torch.randn(*lead, channels) * 10).to(dtype)
    y, empty = hadamard(x, block)
    h = hadamard_matrix(block)
    assert h is not None and empty.numel() == 0 and y.dtype == dtype and y.shape == x.shape
    blocks = x.double().unflatten(-1, (-1, block))
    exact = (blocks @ h.double() / block**0.5).flatten(-2)
    # each term passes at most block additions, the factor and its product; then one rounding to x's dtype
    terms = (blocks.abs().sum(-1, keepdim=True) / block**0.5).expand(blocks.shape).flatten(-2)
    info = torch.finfo(dtype)
    bound = (block + 4) * U32 * terms + info.eps / 2 * exact.abs() * (1 + 1e-3) + info.smallest_normal * info.eps
    assert ((y.double() - exact).abs() <= bound).all()
    if grid:
        codes, scale = hadamard(x, block, grid)
        expected = codes_of(y, grid, None, None)
        assert torch.equal(codes.float(), expected[0].float()) and torch.equal(scale, expected[1])


def test_transform_is_orthonormal() -> None:
    x = torch.randn(3, 240, dtype=torch.float64)
    assert torch.allclose(transform(x, 80).square().sum(-1), x.square().sum(-1))


@pytest.mark.parametrize(("lead", "channels", "block", "grid"), CASES)
def test_opcheck(lead: tuple[int, ...], channels: int, block: int, grid: str) -> None:
    opcheck(hadamard, (torch.randn(*lead, channels), block, grid))


def test_static_scale() -> None:
    x, scale, zero = torch.randn(2, 3, 16), torch.tensor(0.02), torch.tensor(100, dtype=torch.int32)
    codes, scales = hadamard(x, 16, "uint8", scale, zero)
    expected = (transform(x, 16) / 0.02).round().add(100).clamp(0, 255)
    assert codes.dtype == torch.uint8 and scales.shape == (2, 3, 1) and (scales == scale).all()
    assert (codes.float() - expected).abs().max() <= 1


def test_refusals() -> None:
    x = torch.randn(2, 24)
    with pytest.raises(KernelError, match="do not divide"):
        hadamard(x, 16)
    with pytest.raises(KernelError, match="no matrix of order 6"):
        hadamard(x, 6)
    with pytest.raises(KernelError, match="zero point"):
        hadamard(x, 8, "uint8")
    assert supports(24, 8) is None
