"""GPTQ: the laws that its algebra promises, against a plain column-by-column rewrite of the paper's algorithm."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.grid import Int
from qfx.core.qtensor import encode, fake_quantize
from qfx.core.spec import QSpec
from qfx.passes.solve._ranges import weight_range
from qfx.passes.solve.gptq import gptq
from qfx.passes.solve.rtn import rtn
from tests.passes.solve.layers import MODES, SPECS, by_column, damped, every_mode, every_spec, layer, loss, same


@every_spec
@pytest.mark.parametrize("fresh", [False, True], ids=["static", "fresh"])
def test_it_is_the_paper_s_algorithm(spec, fresh):
    w, h = layer(0)
    q, _ = gptq(w, spec, h, dtype=torch.float64, block_size=24, static_groups=not fresh)
    assert same(q, by_column(w, spec, h, fresh=fresh))


@every_spec
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diagonal_hessian_gives_rtn_bit_for_bit(spec, mode, dtype):
    w, h = layer(0)
    if mode.get("act_order") and not mode.get("static_groups", True):
        h = torch.diag(h.diagonal().sort(descending=True).values)  # the order is that of the columns
    for diagonal in (torch.diag(h.diagonal()), 3 * torch.eye(64)):
        q, report = gptq(w, spec, diagonal, dtype=dtype, block_size=24, **mode)
        assert same(q, rtn(w, spec))
        assert report.loss == pytest.approx(report.loss_rtn, rel=1e-5)
    assert not torch.equal(gptq(w, spec, layer(0)[1], **mode)[0].dequantize(), rtn(w, spec).dequantize())


@every_spec
@every_mode
def test_the_block_size_does_not_matter(spec, mode):
    w, h = layer(1)
    first, _ = gptq(w, spec, h, dtype=torch.float64, **mode)
    losses = []
    for block_size in (1, 7, 16, 48, 64, 1000):
        q, _ = gptq(w, spec, h, block_size=block_size, dtype=torch.float64, **mode)
        assert same(q, first)
        losses.append(gptq(w, spec, h, block_size=block_size, **mode)[1].loss)
    assert max(losses) <= 1.02 * min(losses)


@every_spec
@every_mode
def test_the_reported_loss_is_that_of_the_damped_hessian(spec, mode):
    w, h = layer(2)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        q, report = gptq(w, spec, h, dtype=dtype, **mode)
        assert report.loss == pytest.approx(loss(w, q.dequantize(), damped(h)), rel=tolerance)
        assert report.loss_rtn == pytest.approx(loss(w, rtn(w, spec).dequantize(), damped(h)), rel=tolerance)
        assert report.loss != pytest.approx(loss(w, q.dequantize(), h), rel=10 * tolerance)
    assert report.damp == 0.01 and report.dead == 0 and not report.guard and report.fallback is None


@every_spec
@every_mode
def test_every_value_is_on_the_grid_of_its_group(spec, mode):
    w, h = layer(3)
    q, _ = gptq(w, spec, h, **mode)
    assert q.codes.shape == w.shape and q.codes.dtype == spec.grid.dtype and q.codes.is_contiguous()
    assert q.scale.shape == (1 if spec.block[0] == -1 else 32, spec.groups(64))
    if isinstance(spec.grid, Int):
        assert q.codes.min() >= spec.grid.lo and q.codes.max() <= spec.grid.hi
    again = encode(q.dequantize(), q.scale, q.zero, spec, q.g_idx)
    assert torch.equal(again.codes.float(), q.codes.float())
    if mode.get("static_groups", True):
        assert torch.equal(q.scale, rtn(w, spec).scale)
    scattered = mode == MODES["fresh_groups_act_order"] and spec.groups(64) > 1
    assert (q.g_idx is not None) == scattered


@pytest.mark.parametrize("clip", ["minmax", "output"])
def test_groups_in_the_order_of_the_columns_are_scattered(clip):
    w, h = layer(4)
    spec = SPECS["int3-group"]
    settings = {"static_groups": False, "clip": clip, "dtype": torch.float64}
    q, report = gptq(w, spec, h, act_order=True, **settings)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    assert q.g_idx is not None
    assert torch.equal(q.g_idx[order], torch.arange(64) // 16)
    # the same as solving the permuted problem with consecutive groups, and putting the columns back
    permuted, _ = gptq(w[:, order], spec, h[order][:, order], **settings)
    assert torch.equal(q.dequantize()[:, order], permuted.dequantize())
    assert report.loss == pytest.approx(loss(w, q.dequantize(), damped(h)), rel=1e-9)
    q.g_idx = q.g_idx.flip(0)  # a wrong index must show
    assert loss(w, q.dequantize(), damped(h)) > 2 * report.loss


@pytest.mark.parametrize("name", ["int4-channel", "uint4-channel", "int8-tensor", "e4m3-channel"])
def test_permuting_the_columns_permutes_the_result_of_act_order(name):
    w, h = layer(5)
    spec = SPECS[name]
    p = torch.randperm(64)
    q, _ = gptq(w, spec, h, act_order=True, dtype=torch.float64)
    moved, _ = gptq(w[:, p], spec, h[p][:, p], act_order=True, dtype=torch.float64)
    assert torch.equal(moved.dequantize(), q.dequantize()[:, p])
    plain, _ = gptq(w, spec, h, dtype=torch.float64)
    moved, _ = gptq(w[:, p], spec, h[p][:, p], dtype=torch.float64)
    assert not torch.equal(moved.dequantize(), plain.dequantize()[:, p])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_rtn_and_act_order_beats_it_on_average(bits, symmetric):
    spec = QSpec(Int(bits, signed=symmetric), symmetric=symmetric)
    plain, ordered, wrong = [], [], []
    for seed in range(12):
        w, h = layer(seed)
        _, report = gptq(w, spec, h)
        plain.append(report.loss / report.loss_rtn)
        ordered.append(gptq(w, spec, h, act_order=True)[1].loss / report.loss_rtn)
        bad = by_column(w, spec, h, sign=1.0)
        wrong.append(loss(w, bad.dequantize(), damped(h)) / report.loss_rtn)
    mean, mean_ordered, mean_wrong = (math.exp(sum(map(math.log, r)) / 12) for r in (plain, ordered, wrong))
    assert mean < 0.35
    assert max(plain) < 1
    assert mean_ordered < mean
    assert mean_wrong > 1  # updates of the wrong sign are worse than none


def test_it_helps_on_inputs_that_it_has_not_seen():
    w, h = layer(0, tokens=4096)
    spec = QSpec(Int(3))
    generator = torch.Generator().manual_seed(1)
    mix = torch.linalg.cholesky(damped(h, 1e-6)).float()
    x = mix @ torch.randn(64, 2000, generator=generator)
    q, _ = gptq(w, spec, h)
    assert ((w - q.dequantize()) @ x).square().sum() < 0.5 * ((w - rtn(w, spec).dequantize()) @ x).square().sum()


@pytest.mark.parametrize("name", ["int4-channel", "uint4-channel"])
def test_the_codes_are_those_of_ldlq(name):
    """`H = (I + L) D (I + L)^T`, column j rounds `w_j + (w - q)_{<j} L_{<j,j}`: no inverse anywhere."""
    w, h = layer(6)
    spec = SPECS[name]
    lower = torch.linalg.cholesky(damped(h).flip(0, 1)).flip(0, 1)
    feedback = lower / lower.diagonal()
    scale, zero = weight_range(w, spec)
    wide, q = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for j in range(64):
        target = wide[:, j : j + 1] + (wide - q)[:, :j] @ feedback[:j, j : j + 1]
        q[:, j : j + 1] = fake_quantize(target, scale, zero, spec)
    assert torch.equal(gptq(w, spec, h, dtype=torch.float64)[0].dequantize(), q.float())


def test_a_group_s_range_is_that_of_columns_that_have_had_all_updates():
    spec = replace(SPECS["int3-group"], block=(1, 8))
    fresh, stale = [], []
    for seed in range(12):
        w, h = layer(seed)
        q, report = gptq(w, spec, h, static_groups=False, dtype=torch.float64)
        assert same(q, by_column(w, spec, h, fresh=True))
        old = by_column(w, spec, h, fresh=True, stale=32)
        assert not torch.equal(old.scale, q.scale)
        fresh.append(report.loss)
        stale.append(loss(w, old.dequantize(), damped(h)))
    assert sum(map(math.log, fresh)) < sum(map(math.log, stale))


def test_the_worked_example():
    """H = [[2, 1], [1, 2]], step 1, w = (0.4, 0.4): codes (0, 1) lose 0.56, nearest 0.96.

    A third column, on its own in H, holds 3 and so makes the step of the two-bit grid 1.
    """
    h = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    spec = QSpec(Int(2, signed=False), symmetric=False)
    q, report = gptq(torch.tensor([[0.4, 0.4, 3.0]]), spec, h, damp=0.0)
    assert q.dequantize().tolist() == [[0.0, 1.0, 3.0]]
    assert report.loss == pytest.approx(0.56) and report.loss_rtn == pytest.approx(0.96)


def runaway(columns: int = 64, rows: int = 16, c: float = 0.01) -> tuple[Tensor, Tensor]:
    """The finite grid's counter-example of QuIP: feedback drives the last columns off the grid."""
    h = torch.ones(columns, columns) + torch.eye(columns)
    h[-1, -1] = 1
    h[0, 1:-1] += 2 * c
    h[1:-1, 0] += 2 * c
    h[0, -1] += c
    h[-1, 0] += c
    h[0, 0] += 4 * c + columns * c**2
    w = torch.full((rows, columns), 0.499)
    w[:, 1::2] += 0.002
    alone = torch.zeros(columns + 1, columns + 1)
    alone[:-1, :-1] = h
    alone[-1, -1] = 1
    return torch.cat([w, torch.full((rows, 1), 3.0)], 1), alone  # 3 makes the step 1


def test_the_guard_keeps_rtn_where_the_grid_ends_too_soon():
    w, h = runaway()
    spec = QSpec(Int(2, signed=False), symmetric=False)
    bare, plain = gptq(w, spec, h, damp=0.0, dtype=torch.float64)
    assert plain.loss > 10 * plain.loss_rtn and not plain.guard
    assert loss(w, bare.dequantize(), h) == pytest.approx(plain.loss, rel=1e-6)
    kept, report = gptq(w, spec, h, damp=0.0, dtype=torch.float64, keep_better=True)
    assert report.guard and report.loss == plain.loss
    assert same(kept, rtn(w, spec))
    w, h = layer(0)
    kept, report = gptq(w, spec, h, keep_better=True)
    assert not report.guard and same(kept, gptq(w, spec, h)[0])
