"""Rounding to nearest and range selection: on the grid, within half a step, and no clip worse than min-max."""

import pytest
import torch
from torch import Tensor

from qfx.core.errors import SolverError
from qfx.core.grid import E4M3, E5M2, Codebook, Int
from qfx.core.qtensor import QTensor, blocked, encode
from qfx.core.spec import QSpec
from qfx.passes.solve.rtn import rtn

BLOCKS = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, 16), "tensor_group": (-1, 16)}
GRIDS = {
    "int2": Int(2),
    "int4": Int(4),
    "int8_narrow": Int(8, narrow=True),
    "uint2": Int(2, signed=False),
    "uint4": Int(4, signed=False),
    "e4m3": E4M3,
    "e5m2": E5M2,
    "nf4": Codebook("nf4"),
    "fp4": Codebook("e2m1"),
}
SPECS = {
    f"{grid}-{block}": QSpec(g, b, symmetric=not grid.startswith("uint"))
    for grid, g in GRIDS.items()
    for block, b in BLOCKS.items()
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Weights with outliers, which is what clipping is for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def gram(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, 3 * columns, generator=generator)
    x *= torch.exp(1.5 * torch.randn(columns, 1, generator=generator))
    return 2 / x.shape[1] * x @ x.T


def block_error(w: Tensor, q: QTensor, norm: float, weights: Tensor | None = None) -> Tensor:
    """`sum weight |Q - w|^norm` of each block, float64."""
    error = (q.dequantize().double() - w.double()).abs() ** norm
    return blocked(error if weights is None else error * weights.double(), q.spec).sum(-1)


@every_spec
@pytest.mark.parametrize("clip", ["minmax", "mse", "output"])
@pytest.mark.parametrize("shape", [(12, 48), (3, 12, 48)], ids=["linear", "experts"])
def test_the_result_is_on_its_grid_and_rounding_it_again_changes_nothing(spec, clip, shape):
    w = heavy(*shape)
    hessian = gram(48) if len(shape) == 2 else torch.stack([gram(48, i) for i in range(3)])
    q = rtn(w, spec, hessian, clip=clip)
    rows = 1 if spec.block[0] == -1 else 12
    assert q.scale.shape == (*shape[:-2], rows, spec.groups(48))
    assert q.codes.shape == w.shape and q.codes.dtype == spec.grid.dtype
    assert (q.zero is None) == spec.symmetric
    assert torch.isfinite(q.dequantize()).all() and (q.scale > 0).all()
    if isinstance(spec.grid, Int):
        assert q.codes.min() >= spec.grid.lo and q.codes.max() <= spec.grid.hi
    again = encode(q.dequantize(), q.scale, q.zero, spec)
    assert torch.equal(again.codes.float(), q.codes.float())


@every_spec
def test_min_max_errors_are_at_most_half_a_step(spec):
    w = heavy(12, 48)
    q = rtn(w, spec)
    error = (q.dequantize() - w).abs()
    scale = q.per_column()[0].expand_as(w)
    if isinstance(spec.grid, Int):
        # a zero point is rounded, so the ends of an asymmetric range may be half a step outside
        assert (error <= scale * (0.5 if spec.symmetric else 1.0) * (1 + 1e-4)).all()
    elif isinstance(spec.grid, Codebook):
        widest = torch.tensor(sorted(spec.grid.values)).diff().max()
        assert (error <= scale * widest / 2 * (1 + 1e-4)).all()
    else:  # half a unit in the last place, or half the smallest subnormal
        smallest = torch.finfo(spec.grid.dtype).smallest_normal * 2.0**-spec.grid.man
        assert (error <= torch.maximum(w.abs() * 2.0 ** -(spec.grid.man + 1), scale * smallest / 2) * (1 + 1e-4)).all()


@every_spec
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_mse_is_never_worse_than_min_max_under_its_own_norm(spec, norm):
    w = heavy(24, 64)
    wide, tight = rtn(w, spec), rtn(w, spec, clip="mse", norm=norm)
    before, after = block_error(w, wide, norm), block_error(w, tight, norm)
    assert (after <= before * (1 + 1e-6)).all()
    if isinstance(spec.grid, Int) and spec.grid.bits <= 4:
        assert after.sum() < 0.99 * before.sum()  # and it does clip


@every_spec
def test_output_clipping_is_never_worse_than_min_max_under_the_hessian_s_diagonal(spec):
    w, h = heavy(24, 64), gram(64)
    importance = h.diagonal().expand_as(w)
    before = block_error(w, rtn(w, spec), 2, importance)
    after = block_error(w, rtn(w, spec, h, clip="output"), 2, importance)
    assert (after <= before * (1 + 1e-6)).all()


def test_output_clipping_looks_at_the_hessian():
    w, h, spec = heavy(24, 64), gram(64), QSpec(Int(3))
    importance = h.diagonal().expand_as(w)
    chosen = rtn(w, spec, h, clip="output")
    blind = rtn(w, spec, clip="mse", norm=2.0)
    wrong = rtn(w, spec, h.flip(0, 1), clip="output")
    assert block_error(w, chosen, 2, importance).sum() < 0.8 * block_error(w, blind, 2, importance).sum()
    assert block_error(w, chosen, 2, importance).sum() < 0.8 * block_error(w, wrong, 2, importance).sum()
    uniform = rtn(w, spec, torch.eye(64), clip="output")
    assert torch.equal(uniform.codes, blind.codes)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_error_falls_with_every_bit(symmetric, block):
    w = heavy(24, 64)
    errors = [
        block_error(w, rtn(w, QSpec(Int(b, signed=symmetric), block, symmetric), clip="mse", norm=2.0), 2).sum()
        for b in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


@every_spec
@pytest.mark.parametrize("clip", ["minmax", "mse", "output"])
def test_scaling_a_weight_scales_the_result(spec, clip):
    w, h = heavy(12, 48), gram(48)
    q = rtn(w, spec, h, clip=clip)
    for factor in (2.0**-9, 8.0):  # powers of two: exact
        scaled = rtn(factor * w, spec, h, clip=clip)
        assert torch.equal(scaled.codes.float(), q.codes.float())
        assert torch.equal(scaled.scale, factor * q.scale)


def test_smaller_groups_are_better_on_average():
    errors = torch.zeros(4, dtype=torch.float64)
    for seed in range(8):
        w = heavy(16, 64, seed=seed)
        for i, size in enumerate((-1, 32, 16, 8)):
            errors[i] += block_error(w, rtn(w, QSpec(Int(4), (1, size))), 2).sum().log()
    assert (errors[1:] < errors[:-1]).all()


def test_the_symmetric_grid_covers_both_signs_alike():
    """Sixteen codes for [-1, 1] are 2/15 apart, so both ends are half a step off, and no more."""
    q = rtn(torch.tensor([[1.0, -1.0, 0.0]]), QSpec(Int(4)))
    torch.testing.assert_close(q.scale, torch.tensor([[2 / 15]]))
    error = (q.dequantize() - torch.tensor([[1.0, -1.0, 0.0]])).abs()
    torch.testing.assert_close(error, torch.tensor([[1 / 15, 1 / 15, 0.0]]))


@every_spec
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_rows_of_one_sign_and_rows_of_zeros(spec, clip):
    ramp = torch.linspace(0.1, 1, 48)
    w = torch.stack([ramp, -ramp, torch.zeros(48), torch.full((48,), 0.7)])
    q = rtn(w, spec, clip=clip)
    values = q.dequantize()
    assert torch.isfinite(values).all()
    assert (values[2] == 0).all()
    if isinstance(spec.grid, Int) and clip == "minmax":  # a row without negatives keeps its own top level
        assert ((values - w).abs() <= (0.5 if spec.symmetric else 1.0) * q.per_column()[0] + 1e-6).all()


def test_experts_are_solved_one_by_one():
    w, h = heavy(3, 8, 32), torch.stack([gram(32, i) for i in range(3)])
    for block in BLOCKS.values():
        for clip in ("minmax", "mse", "output"):
            spec = QSpec(Int(4, signed=False), block, symmetric=False)
            together = rtn(w, spec, h, clip=clip)
            for i in range(3):
                alone = rtn(w[i], spec, h[i], clip=clip)
                assert torch.equal(together.codes[i], alone.codes)
                assert torch.equal(together.scale[i], alone.scale)


def test_a_weight_larger_than_one_search_chunk():
    w = heavy(700, 512)
    whole = rtn(w, QSpec(Int(4)), clip="mse")
    last = rtn(w[-3:], QSpec(Int(4)), clip="mse")
    assert torch.equal(whole.scale[-3:], last.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    w = heavy(8, 32).to(dtype)
    for clip in ("minmax", "mse"):
        assert torch.equal(rtn(w, QSpec(Int(4)), clip=clip).codes, rtn(w.float(), QSpec(Int(4)), clip=clip).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    w = heavy(4, 16)
    w[1, 3] = bad
    with pytest.raises(SolverError, match=r"weight \[4, 16\] has 1 values that are not finite"):
        rtn(w, QSpec(Int(4)))
    h = gram(16)
    h[2, 2] = bad
    with pytest.raises(SolverError, match="hessian"):
        rtn(heavy(4, 16), QSpec(Int(4)), h, clip="output")


def test_what_does_not_fit_is_refused():
    w = heavy(4, 16)
    with pytest.raises(SolverError, match="unknown clip 'percentile'; use one of minmax, mse, output"):
        rtn(w, QSpec(Int(4)), clip="percentile")
    with pytest.raises(SolverError, match="there is none"):
        rtn(w, QSpec(Int(4)), clip="output")
    with pytest.raises(SolverError, match="group_size 5 does not divide 16"):
        rtn(w, QSpec(Int(4), (1, 5)))
    with pytest.raises(SolverError, match="blocks of 4 rows"):
        rtn(w, QSpec(Int(4), (4, -1)))
