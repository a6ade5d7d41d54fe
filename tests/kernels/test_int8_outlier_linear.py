"""`qfx::int8_outlier_linear` against float64, and against what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.qtensor import dynamic_scale, fake_quantize
from qfx.core.spec import parse_scheme
from qfx.kernels.int8_linear import int8_linear
from qfx.kernels.int8_outlier_linear import CASES, STEP, int8_outlier_linear, supports
from tests.kernels.law import DTYPES, U32, opcheck

SPEC = parse_scheme("W8A8").input


@dataclass
class Outliers:
    """A linear with outlier channels 60 times as large as the rest; `w` is what it stands for."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor
    w: Tensor
    columns: Tensor | None
    weight: Tensor | None
    threshold: float
    capacity: int = 16

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.x, self.codes, self.scale, self.bias, self.columns, self.weight, self.threshold, self.capacity)

    def to(self, device: str) -> Outliers:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def make(
    lead: tuple[int, ...], columns: int, rows: int, count: int, threshold: float, dtype: torch.dtype = torch.float32
) -> Outliers:
    """`count` static outliers, or three that pass the threshold."""
    w = torch.randn(rows, columns) / columns**0.5
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    where = torch.randperm(columns)[: 3 if threshold else count]
    x = torch.randn(*lead, columns).clamp(-4, 4)
    x[..., where] *= 60
    if x.numel():
        x.view(-1, columns)[0, where] = 200  # each passes the threshold
    bias = torch.randn(rows).to(dtype)
    if threshold:
        return Outliers(x.to(dtype), codes, scale, bias, w, None, None, threshold)
    weight = F.pad(w[:, where].bfloat16(), (0, -count % STEP))
    return Outliers(x.to(dtype), codes, scale, bias, w, where.to(torch.int32), weight, 0.0)


def parts(o: Outliers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64: x on its int8 grid without outliers, the dequantized weight, outliers of x, and their weight."""
    flat = o.x.reshape(-1, o.x.shape[-1])
    w = o.codes.double() * o.scale.double()
    if o.columns is None:
        passing = flat.float().abs().amax(0) > o.threshold if flat.shape[0] else torch.zeros(flat.shape[1]).bool()
        columns = passing.nonzero().reshape(-1)
        dtype = torch.bfloat16 if o.x.dtype == torch.float32 else o.x.dtype
        wo = (o.codes.float() * o.scale)[:, columns].to(dtype).double()
    else:
        columns, dtype = o.columns.long(), torch.bfloat16
        wo = o.weight[:, : len(columns)].double()
    xo = flat[:, columns].to(dtype).double()
    rest = flat.clone().float()
    rest[:, columns] = 0
    if flat.numel():
        rest = fake_quantize(rest, *dynamic_scale(rest, SPEC), SPEC)
    return rest.double(), w, xo, wo


def violation(out: Tensor, o: Outliers) -> float:
    """The largest distance from float64 in units of its bound: as in `law`, K + 8 roundings of all terms."""
    x, w, xo, wo = parts(o)
    y = x @ w.t() + xo @ wo.t() + o.bias.double()
    terms = x.abs() @ w.abs().t() + xo.abs() @ wo.abs().t() + o.bias.double().abs()
    bound = (x.shape[1] + 8) * U32 * terms
    info = torch.finfo(o.x.dtype)
    bound = bound + info.eps / 2 * (y.abs() + bound) + info.smallest_normal * info.eps
    assert out.shape == (*o.x.shape[:-1], len(o.codes)) and out.dtype == o.x.dtype and out.is_contiguous()
    return ((out.reshape(y.shape).double() - y).abs() / bound).max().item() if out.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_law(shape: tuple, dtype: torch.dtype) -> None:
    o = make(*shape, dtype)
    assert violation(int8_outlier_linear(*o.args), o) <= 1


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_it_is_closer_to_the_weight_than_plain_int8(threshold: float) -> None:
    o = make((32,), 128, 64, 3, threshold)
    exact = F.linear(o.x, o.w, o.bias)
    plain = int8_linear(o.x, o.codes, o.scale, o.bias)
    error = (int8_outlier_linear(*o.args) - exact).square().mean()
    assert error < (plain - exact).square().mean() / 3


def test_more_than_the_capacity_stays_in_int8() -> None:
    o = make((9,), 64, 16, 0, 6.0)
    o.x[:, :20] = 100 + torch.arange(20)
    out = int8_outlier_linear(*o.args)
    # the 16 largest are taken: only 100..103 are left, and the three of the case
    x = o.x.clone()
    top = x.abs().amax(0).topk(16).indices
    expected = replace(o, threshold=x.abs().amax(0).topk(17).values[-1].item())
    assert set(range(4, 20)) & set(top.tolist()) and violation(out, expected) <= 1


def test_none_passes_a_high_threshold() -> None:
    o = replace(make((9,), 64, 16, 0, 6.0), threshold=1e6)
    assert torch.allclose(int8_outlier_linear(*o.args), int8_linear(o.x, o.codes, o.scale, o.bias), atol=1e-5)


def test_the_law_notices_forgotten_outliers() -> None:
    o = make((9,), 64, 16, 3, 0.0, torch.bfloat16)
    assert violation(int8_outlier_linear(*replace(o, weight=o.weight * 0).args), o) > 1
    assert violation(int8_linear(o.x, o.codes, o.scale, o.bias), o) > 1


@pytest.mark.parametrize("shape", CASES)
def test_opcheck(shape: tuple) -> None:
    opcheck(int8_outlier_linear, make(*shape).args)


@pytest.mark.parametrize(("count", "threshold"), [(3, 0.0), (0, 6.0)])
def test_gradient_is_straight_through(count: int, threshold: float) -> None:
    o = make((5,), 33, 17, count, threshold)
    x, g = o.x.requires_grad_(), torch.randn(5, 17)
    opcheck(int8_outlier_linear, o.args)
    int8_outlier_linear(*o.args).backward(g)
    w = o.codes.float() * o.scale
    if o.columns is not None:
        w[:, o.columns.long()] = o.weight[:, :count].float()
    assert torch.allclose(x.grad, g @ w, atol=1e-5)


def test_refusals() -> None:
    o = make((9,), 64, 16, 3, 0.0)
    for change, reason in (
        ({"x": o.x[:, :8]}, "x ends in `in`"),
        ({"weight": None}, "give outlier_columns and outlier_weight"),
        ({"threshold": 6.0}, "give outlier_columns and outlier_weight"),
        ({"weight": o.weight[:, :3]}, "an outlier_weight"),
        ({"weight": o.weight.float()}, "an outlier_weight"),
        ({"columns": None, "weight": None, "threshold": 6.0, "capacity": 5}, "a multiple of 16"),
    ):
        with pytest.raises(KernelError, match=reason):
            int8_outlier_linear(*replace(o, **change).args)
    assert supports(parse_scheme("W8A8"), 64) is None
    assert "not dynamic per token" in (supports(parse_scheme("W8A8_STATIC"), 64) or "")
    assert "int8_outlier_linear: the input is not" in (supports(parse_scheme("FP8"), 64) or "")
