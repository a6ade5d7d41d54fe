"""What the tests of GPTQ share: layers, formats, losses, and the paper's algorithm written out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.grid import E4M3, Codebook, Int
from qfx.core.qtensor import QTensor, encode, fake_quantize
from qfx.core.spec import QSpec
from qfx.passes.solve._ranges import weight_range

SPECS = {
    "int4-channel": QSpec(Int(4)),
    "int3-group": QSpec(Int(3), (1, 16)),
    "uint4-channel": QSpec(Int(4, signed=False), symmetric=False),
    "uint2-group": QSpec(Int(2, signed=False), (1, 16), symmetric=False),
    "int8-tensor": QSpec(Int(8, narrow=True), (-1, -1)),
    "int4-tensor_group": QSpec(Int(4), (-1, 16)),
    "e4m3-channel": QSpec(E4M3),
    "e4m3-tensor": QSpec(E4M3, (-1, -1)),
    "nf4-group": QSpec(Codebook("nf4"), (1, 16)),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
MODES = {
    "plain": {},
    "act_order": {"act_order": True},
    "fresh_groups": {"static_groups": False},
    "fresh_groups_act_order": {"static_groups": False, "act_order": True},
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def layer(seed: int, rows: int = 32, columns: int = 64, tokens: int = 256) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of inputs that mix sources of log-normal strength."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(columns, tokens, generator=generator)
    sources *= torch.exp(torch.randn(columns, 1, generator=generator))
    x = torch.randn(columns, columns, generator=generator) @ sources
    return torch.randn(rows, columns, generator=generator), 2 / tokens * x @ x.T


def damped(h: Tensor, damp: float = 0.01) -> Tensor:
    return h.double() + damp * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def loss(w: Tensor, q: Tensor, h: Tensor) -> float:
    error = w.double() - q.double()
    return float((error @ h.double() * error).sum())


def by_column(w: Tensor, spec: QSpec, h: Tensor, *, sign: float = -1.0, fresh: bool = False, stale: int = 0) -> QTensor:
    """Algorithm 1 of the paper without blocks, in float64, from the Cholesky factor of an inverse.

    `sign=1` adds the updates instead; `stale=B` reads a group's range from the weight as it was when the
    block of B columns began. Both are mistakes.
    """
    target, columns = w.double(), w.shape[1]
    snapshot = target.clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    scale, zero = weight_range(w, spec)
    size = columns // scale.shape[1]
    own = replace(spec, block=(spec.block[0], -1))
    done = target.clone()
    for j in range(columns):
        g = j // size
        if stale and j % stale == 0:
            snapshot = target.clone()
        if fresh and j % size == 0:
            s, z = weight_range((snapshot if stale else target)[:, j : j + size], own)
            scale[:, g : g + 1] = s
            if zero is not None and z is not None:
                zero[:, g : g + 1] = z
        done[:, j] = target[:, j]
        q = fake_quantize(target[:, j], scale[:, g], None if zero is None else zero[:, g], spec)
        error = (target[:, j] - q) / upper[j, j]
        target[:, j:] += sign * error[:, None] * upper[j, j:]
    return encode(done, scale, zero, spec)


def same(a: QTensor, b: QTensor) -> bool:
    zeros = (a.zero is None and b.zero is None) or torch.equal(a.zero, b.zero)
    return torch.equal(a.codes.float(), b.codes.float()) and torch.equal(a.scale, b.scale) and zeros
