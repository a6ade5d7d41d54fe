"""OBQ: the greedy order, against inverses that are computed anew at every step, and GPTQ's yardstick."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.errors import SolverError
from qfx.core.grid import E4M3, Codebook, Int
from qfx.core.qtensor import QTensor, encode, fake_quantize
from qfx.core.spec import QSpec
from qfx.passes.solve._ranges import weight_range
from qfx.passes.solve.gptq import gptq
from qfx.passes.solve.obq import obq
from qfx.passes.solve.rtn import rtn

SPECS = {
    "int3-channel": QSpec(Int(3)),
    "uint2-channel": QSpec(Int(2, signed=False), symmetric=False),
    "uint4-tensor": QSpec(Int(4, signed=False), (-1, -1), symmetric=False),
    "e4m3-channel": QSpec(E4M3),
    "nf4-channel": QSpec(Codebook("nf4")),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def layer(
    seed: int, rows: int = 32, columns: int = 64, tokens: int = 256, spread: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of mixed log-normal sources; `spread` makes the inputs log-normal too."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(columns, tokens, generator=generator)
    sources *= torch.exp(torch.randn(columns, 1, generator=generator))
    x = torch.randn(columns, columns, generator=generator) @ sources
    x *= torch.exp(spread * torch.randn(columns, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator), 2 / tokens * x @ x.T


def damped(h: Tensor) -> Tensor:
    return h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def loss(w: Tensor, q: QTensor, h: Tensor) -> float:
    error = w.double() - q.dequantize().double()
    return float((error @ h.double() * error).sum())


def greedy(w: Tensor, spec: QSpec, h: Tensor, outlier_rule: bool) -> tuple[QTensor, float]:
    """The definition: invert H over the free weights, round the cheapest, move the others; and the costs' sum."""
    h, scale, zero = damped(h), *weight_range(w, spec)
    final, total = torch.empty_like(w, dtype=torch.float64), 0.0
    for r, row in enumerate(w.double()):
        k = min(r, len(scale) - 1)
        z = None if zero is None else zero[k]
        free = list(range(len(h)))
        while free:
            inverse = torch.linalg.inv(h[free][:, free])
            now = row[free]
            error = now - fake_quantize(now, scale[k], z, spec)
            cost = error.square() / inverse.diagonal()
            p = int(cost.argmin())
            if isinstance(spec.grid, Int):
                off = error.abs() > 0.5001 * scale[k]
            else:
                off = now.abs() > 1.0001 * spec.grid.reach * scale[k]
            if outlier_rule and off.any():
                p = int(torch.where(off, error.abs(), -1.0).argmax())
            final[r, free[p]] = now[p]
            row[free] = now - inverse[:, p] * error[p] / inverse[p, p]
            total += float(cost[p])
            free.pop(p)
    return encode(final, scale, zero, spec), total


@every_spec
@pytest.mark.parametrize("outlier_rule", [True, False], ids=["outliers_first", "bare"])
def test_it_is_the_greedy_order_of_the_definition(spec, outlier_rule):
    w, h = layer(0, 6, 20, 60)
    q = obq(w, spec, h, rows=4, outlier_rule=outlier_rule)
    expected, costs = greedy(w, spec, h, outlier_rule)
    assert torch.equal(q.codes.float(), expected.codes.float()) and torch.equal(q.scale, expected.scale)
    assert loss(w, q, damped(h)) == pytest.approx(costs, rel=1e-6)  # the costs add up to the loss


@every_spec
def test_the_number_of_rows_at_once_does_not_matter(spec):
    w, h = layer(1, 10, 24, 60)
    first = obq(w, spec, h)
    for rows in (1, 3, 10):
        assert torch.equal(obq(w, spec, h, rows=rows).codes.float(), first.codes.float())


@every_spec
def test_a_diagonal_hessian_gives_rtn(spec):
    w, h = layer(2, 10, 24, 60)
    for diagonal in (torch.diag(h.diagonal()), torch.eye(24)):
        for outlier_rule in (True, False):
            q = obq(w, spec, diagonal, outlier_rule=outlier_rule)
            assert torch.equal(q.codes.float(), rtn(w, spec).codes.float())
    assert not torch.equal(obq(w, spec, h).codes.float(), rtn(w, spec).codes.float())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_better_than_gptq_on_average_and_gptq_than_rtn(bits):
    spec = QSpec(Int(bits, signed=False), symmetric=False)
    ratios = torch.zeros(3, 12, dtype=torch.float64)
    for seed in range(12):
        w, h = layer(seed)
        nearest = loss(w, rtn(w, spec), damped(h))
        ratios[0, seed] = loss(w, obq(w, spec, h), damped(h)) / nearest
        ratios[1, seed] = loss(w, gptq(w, spec, h)[0], damped(h)) / nearest
        ratios[2, seed] = loss(w, obq(w, spec, h, outlier_rule=False), damped(h)) / nearest
    greedy_mean, fixed_mean, bare_mean = ratios.log().mean(1).exp().tolist()
    assert greedy_mean <= fixed_mean < 0.35
    assert greedy_mean < bare_mean < 0.35  # the rule for outliers helps


def test_the_greedy_order_loses_where_inputs_differ_much_in_size():
    """Cheap weights are those of small inputs: rounding them first leaves nothing to make up for the large ones."""
    spec = SPECS["int3-channel"]
    ratio = 0.0
    for seed in range(6):
        w, h = layer(seed, spread=1.0)
        ordered = loss(w, gptq(w, spec, h, act_order=True)[0], damped(h))
        ratio += math.log(loss(w, obq(w, spec, h), damped(h)) / ordered)
    assert ratio / 6 > math.log(2)


@pytest.mark.parametrize("tokens", [1, 5])
def test_singular_hessians_dead_inputs_and_odd_rows(tokens):
    w, h = layer(3, 6, 20, tokens)
    h[4], h[:, 4] = 0, 0
    w[0], w[1] = 0, w[1].abs()
    for spec in SPECS.values():
        q = obq(w, spec, h)
        assert torch.isfinite(q.dequantize()).all()
        assert (q.dequantize()[:, 4] == 0).all()
    alone = obq(w[:, :1], SPECS["int3-channel"], h[:1, :1])
    assert torch.equal(alone.codes, rtn(w[:, :1], SPECS["int3-channel"]).codes)


def test_every_code_is_on_the_grid_and_nothing_is_written_to():
    w, h = layer(4, 10, 24, 60)
    before = w.clone(), h.clone()
    q = obq(w, SPECS["uint2-channel"], h)
    assert q.codes.dtype == torch.uint8 and q.codes.max() <= 3
    assert torch.equal(q.codes, obq(w, SPECS["uint2-channel"], h).codes)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_what_does_not_fit_is_refused():
    w, h = layer(0, 6, 20, 60)
    spec = SPECS["int3-channel"]
    with pytest.raises(SolverError, match="no groups of 5 columns"):
        obq(w, replace(spec, block=(1, 5)), h)
    with pytest.raises(SolverError, match="one at a time"):
        obq(w, spec, h[:3, :3])
    with pytest.raises(SolverError, match="no Cholesky factor"):
        obq(w, spec, h - 2 * h.diagonal().max() * torch.eye(20))
    with pytest.raises(SolverError, match="no input was ever active"):
        obq(w, spec, torch.zeros(20, 20))
    w[0, 0] = math.nan
    with pytest.raises(SolverError, match=r"weight .* not finite"):
        obq(w, spec, h)
