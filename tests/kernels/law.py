"""The law of the linear ops: output = fake_quantize(x) · dequantize(W)ᵀ + bias, within what rounding allows.

Derivation of the bound. Let u = 2⁻²⁴ be the unit roundoff of float32, x̂ and ŵ the fake-quantized operands, and
γ_n = n u / (1 - n u). The reference multiplies x̂ and ŵ in float64, whose own error is negligible. An op may scale
before the sum or behind it; either way a term of the sum passes, in the op and in the reference together, at most:
4 roundings that form x̂ and ŵ (code · scale, once on each side), 1 of the product, K - 1 of the additions, 2 of
scales applied behind the sum, and 1 of the bias, K + 7 in all. A zero point adds none: code - zero is an integer
below 2⁹. So |y - ref| <= γ_{K+8} (Σ|x̂||ŵ| + |b|).

The cast to the output's dtype, with unit roundoff u_d, adds u_d |y| and half of the smallest subnormal. Where the
product itself runs in that dtype (weight-only ops: ŵ is cast first, in the reference too), the sum may be rounded
once more before the bias is added, which is u_d |y - b| <= u_d (|y| + |b|).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.core.grid import Codebook
from qfx.core.qtensor import QTensor, blocked, dynamic_scale, encode, fake_quantize, scale_from_range
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.kernels.pack import pack
from qfx.kernels.quantize_rows import grid_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclass
class Case:
    """A linear and its input. `static` is the (scale, zero) of a static input."""

    x: Tensor
    weight: QTensor
    bias: Tensor | None
    scheme: Scheme
    static: tuple[Tensor | None, Tensor | None] = (None, None)

    def to(self, device: str) -> Case:
        """The same case on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        scale, zero = (None if t is None else t.to(device) for t in self.static)
        return Case(self.x.to(device), self.weight.to(device), bias, self.scheme, (scale, zero))

    @property
    def codes(self) -> Tensor:
        """The codes as ops take them."""
        bits = self.weight.spec.grid.bits
        return pack(self.weight.codes, bits) if bits < 8 else self.weight.codes

    @property
    def stored(self) -> dict[str, object]:
        """The keyword arguments that describe stored codes."""
        grid = self.weight.spec.grid
        shape = {"bits": grid.bits, "in_features": self.weight.codes.shape[-1]}
        table = {"table": grid.name} if isinstance(grid, Codebook) else {}
        return {**shape, "signed": getattr(grid, "signed", True), **table}

    @property
    def input(self) -> dict[str, object]:
        """The keyword arguments that describe the activation."""
        spec = self.scheme.input
        assert spec is not None
        per_tensor = spec.dynamic and spec.block == (-1, -1)
        return {"x_grid": grid_name(spec.grid), "per_tensor": per_tensor}


def quantize_weight(w: Tensor, spec: QSpec, g_idx: Tensor | None = None) -> QTensor:
    """Nearest codes, scales from the range; with g_idx, the ranges of the consecutive groups used out of order."""
    blocks = blocked(w, spec)
    scale, zero = scale_from_range(blocks.amin(-1), blocks.amax(-1), spec)
    return encode(w, scale, zero, spec, g_idx)


def make_case(
    lead: tuple[int, ...],
    columns: int,
    rows: int,
    scheme: str | Scheme,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    act_order: bool = False,
    peak: float | None = None,
) -> Case:
    """A random linear; the first token is zero if there are several, one channel is 20 times as large as the rest."""
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    x = torch.randn(*lead, columns)
    x[..., columns // 2] *= 20
    if peak is not None:
        x = x / x.abs().amax() * peak
    flat = x.view(-1, columns)
    if len(flat) > 1:
        flat[0] = 0
    x = x.to(dtype)
    g_idx = None
    if act_order:
        groups = scheme.weight.groups(columns)
        g_idx = torch.arange(groups).repeat_interleave(columns // groups)[torch.randperm(columns)]
    # |w| <= 1 / columns keeps the product of the largest float16 input finite
    weight = quantize_weight(torch.rand(rows, columns).mul(2).sub(1) / columns, scheme.weight, g_idx)
    case = Case(x, weight, (torch.randn(rows) / 8).to(dtype) if bias else None, scheme)
    if scheme.input is not None and not scheme.input.dynamic:
        sample = x.float() * 0.7 if x.numel() else torch.randn(4, columns)  # 0.7: some values are clamped
        scale, zero = dynamic_scale(sample, scheme.input)
        case.static = scale.reshape(()), None if zero is None else zero.reshape(())
    return case


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """The law's right-hand side in float64, and the bound on the distance of an op's output from it."""
    dtype, spec = case.x.dtype, case.scheme.input
    x, w = case.x.float(), case.weight.dequantize()
    if spec is None:
        w = w.to(dtype)
    elif x.numel():
        scale, zero = case.static if case.static[0] is not None else dynamic_scale(x, spec)
        x = fake_quantize(x, scale, zero, spec)
    x64, w64 = x.double(), w.double()
    b64 = torch.zeros(()).double() if case.bias is None else case.bias.double()
    y = x64 @ w64.t() + b64
    n = (w.shape[1] + 8) * U32
    bound = n / (1 - n) * (x64.abs() @ w64.abs().t() + b64.abs())
    info = torch.finfo(dtype)
    u = info.eps / 2
    bound = bound + u * (y.abs() + bound) + info.smallest_normal * info.eps
    if spec is None:
        bound = bound + u * (y.abs() + b64.abs())
    return y, bound


def violation(out: Tensor, case: Case) -> float:
    """The largest distance from the law in units of its bound (at most 1 if the law holds); inf if not finite."""
    y, bound = reference(case)
    assert out.shape == y.shape and out.dtype == case.x.dtype and out.is_contiguous()
    if not out.isfinite().all():
        return float("inf")
    return ((out.double() - y).abs() / bound).max().item() if out.numel() else 0.0


def opcheck(op: torch.library.CustomOpDef, args: tuple[object, ...], kwargs: dict[str, object] | None = None) -> None:
    """`torch.library.opcheck`; its schema test uses `allclose`, which float8 lacks: there, inputs are compared here."""
    outputs = op(*args, **(kwargs or {}))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    float8 = any(isinstance(t, Tensor) and "float8" in str(t.dtype) for t in (*args, *outputs))
    tensors = [t for t in args if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    torch.library.opcheck(op, args, kwargs, test_utils=OPCHECKS[1:] if float8 else OPCHECKS)
    for t, copy in zip(tensors, before, strict=True):
        assert torch.equal(t.float(), copy.float())
        assert not t.numel() or t.data_ptr() not in {out.data_ptr() for out in outputs}
