"""GPTQ where things go wrong: singular Hessians, odd shapes, other dtypes, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from qfx.core.errors import SolverError
from qfx.core.grid import E4M3, Int
from qfx.core.qtensor import stored_scale
from qfx.core.spec import QSpec, parse_scheme
from qfx.passes.solve._obs import exact_matmul, prepare
from qfx.passes.solve.gptq import gptq
from qfx.passes.solve.rtn import rtn
from tests.passes.solve.layers import SPECS, by_column, damped, every_mode, every_spec, layer, loss, same


@every_spec
@every_mode
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_fewer_tokens_than_inputs(spec, mode, tokens):
    w, h = layer(7, tokens=tokens)
    q, report = gptq(w, spec, h, **mode)
    assert torch.isfinite(q.dequantize()).all() and math.isfinite(report.loss)
    assert report.fallback is None
    assert report.loss <= report.loss_rtn


@every_mode
def test_inputs_that_are_always_zero(mode):
    w, h = layer(8)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 17, 40, 63]] = True
    h[dead] = 0
    h[:, dead] = 0
    w[:, 17] = 1e3  # would widen every range
    spec = SPECS["uint4-channel"]
    q, report = gptq(w, spec, h, dtype=torch.float64, **mode)
    assert report.dead == 4 and report.fallback is None
    assert (q.dequantize()[:, dead] == 0).all()
    smaller, small = gptq(w[:, ~dead], spec, h[~dead][:, ~dead], dtype=torch.float64, **mode)
    assert torch.equal(q.dequantize()[:, ~dead], smaller.dequantize())
    assert report.loss == pytest.approx(small.loss) and report.loss_rtn == pytest.approx(small.loss_rtn)


def test_no_live_input_at_all_gives_rtn():
    """An expert that no token reached keeps its weights."""
    w, _ = layer(0)
    q, report = gptq(w, SPECS["int3-group"], torch.zeros(64, 64))
    assert same(q, rtn(w, SPECS["int3-group"]))
    assert report.fallback == "no input was ever active" and report.dead == 64 and report.loss == 0


@every_spec
def test_odd_rows_and_single_inputs(spec):
    w, h = layer(9)
    w[0], w[1], w[2] = 0, w[1].abs(), -w[2].abs()
    q, report = gptq(w, spec, h)
    assert torch.isfinite(q.dequantize()).all() and (q.dequantize()[0].abs() <= 2 * q.per_column()[0].max()).all()
    one = replace(spec, block=(spec.block[0], -1))
    q, report = gptq(w[:, :1], one, h[:1, :1])
    assert same(q, rtn(w[:, :1], one)) and report.fallback is None
    assert torch.isfinite(gptq(w[:1], spec, h)[0].dequantize()).all()


def test_damping_grows_until_there_is_a_factor():
    w, h = layer(0)
    shifted = h - 0.05 * h.diagonal().mean() * torch.eye(64)  # no longer positive
    assert torch.linalg.eigvalsh(shifted)[0] < 0
    _, report = gptq(w, SPECS["int4-channel"], shifted)
    assert report.damp in (0.04, 0.08, 0.16) and report.fallback is None
    assert prepare(torch.ones(8, 8), damp=0.0).damp == 0.01


def test_float64_when_float32_overflows():
    w, h = layer(0)
    huge = h.double() * 1e39
    q, report = gptq(w, SPECS["int4-channel"], huge)
    assert report.fallback == "factored in torch.float64, not in torch.float32"
    assert same(q, gptq(w, SPECS["int4-channel"], h.double(), dtype=torch.float64)[0])


@every_mode
def test_a_hessian_that_is_none_gives_rtn_and_says_so(mode):
    w, h = layer(0)
    indefinite = h - 2 * h.diagonal().mean() * torch.eye(64)
    q, report = gptq(w, SPECS["int3-group"], indefinite, **mode)
    assert same(q, rtn(w, SPECS["int3-group"]))
    assert "no Cholesky factor" in str(report.fallback) and report.damp == 0


@every_mode
def test_layers_of_one_input_share_a_factor(mode):
    w, h = layer(0)
    factor = prepare(h, act_order=mode.get("act_order", False))
    for weight in (w, w.flip(0), 3 * w[:8]):
        shared, _ = gptq(weight, SPECS["int3-group"], h, factor=factor, **mode)
        assert same(shared, gptq(weight, SPECS["int3-group"], h, **mode)[0])


@every_mode
@pytest.mark.parametrize("clip", ["mse", "output"])
def test_clipped_ranges(mode, clip):
    w, h = layer(0)
    spec = SPECS["uint2-group"]
    q, report = gptq(w, spec, h, clip=clip, **mode)
    if mode.get("static_groups", True):
        assert torch.equal(q.scale, rtn(w, spec, h, clip=clip).scale)
    assert report.loss < report.loss_rtn
    assert report.loss == pytest.approx(loss(w, q.dequantize(), damped(h)), rel=1e-4)


@every_mode
def test_two_runs_are_equal_and_the_arguments_are_left_alone(mode):
    w, h = layer(0)
    w_before, h_before = w.clone(), h.clone()
    assert same(gptq(w, SPECS["int3-group"], h, **mode)[0], gptq(w, SPECS["int3-group"], h, **mode)[0])
    assert torch.equal(w, w_before) and torch.equal(h, h_before)
    column = w[:1]
    gptq(column, SPECS["int3-group"], h, **mode)
    assert torch.equal(w, w_before)


def test_bfloat16_weights_and_gradients():
    w, h = layer(0)
    narrow = w.bfloat16()
    assert same(gptq(narrow, SPECS["int4-channel"], h)[0], gptq(narrow.float(), SPECS["int4-channel"], h)[0])
    trained = w.clone().requires_grad_()
    for q in (gptq(trained, SPECS["int3-group"], h, static_groups=False)[0], rtn(trained, SPECS["int3-group"])):
        assert not q.scale.requires_grad


def test_reduced_precision_is_off_inside_and_restored():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with exact_matmul():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_what_does_not_fit_is_refused():
    w, h = layer(0)
    spec = SPECS["int4-channel"]
    with pytest.raises(SolverError, match="group_size 48 does not divide 64"):
        gptq(w, QSpec(Int(4), (1, 48)), h)
    with pytest.raises(SolverError, match="one at a time"):
        gptq(w[None], spec, h)
    with pytest.raises(SolverError, match=r"not \[32, 64\] and \[32, 32\]"):
        gptq(w, spec, h[:32, :32])
    with pytest.raises(SolverError, match="unknown clip"):
        gptq(w, spec, h, clip="nearest")
    with pytest.raises(SolverError, match="damp 1"):
        gptq(w, spec, h, damp=1.0)
    with pytest.raises(SolverError, match="block_size 0"):
        gptq(w, spec, h, block_size=0)
    with pytest.raises(SolverError, match="float16"):
        gptq(w, spec, h, dtype=torch.float16)
    with pytest.raises(SolverError, match="the factor is for another"):
        gptq(w, spec, h, factor=prepare(h), act_order=True)
    for bad in (math.nan, math.inf):
        for which in ("weight", "hessian"):
            broken = {"weight": w.clone(), "hessian": h.clone()}
            broken[which][3, 5] = bad
            with pytest.raises(SolverError, match=f"{which} .* not finite"):
                gptq(broken["weight"], spec, broken["hessian"])


DOUBLE = replace(SPECS["nf4-group"], scale=QSpec(Int(8, signed=False), (1, 24), symmetric=False))
FLOAT_SCALES = replace(SPECS["nf4-group"], block=(1, 8), scale=QSpec(E4M3, (-1, -1)))


MULTIPLES = replace(SPECS["nf4-group"], grid=Int(4), block=(1, 8), scale=parse_scheme("W4A8_DQ").weight.scale)


@pytest.mark.parametrize("spec", [DOUBLE, FLOAT_SCALES, MULTIPLES], ids=["uint8", "e4m3", "multiples"])
def test_scales_that_are_quantized_themselves(spec):
    """Every weight is rounded with the scale that will be stored; ranges that come later are not known in time."""
    w, h = layer(0)
    for mode in ({}, {"act_order": True}):
        q, report = gptq(w, spec, h, dtype=torch.float64, **mode)
        assert (
            report.loss == pytest.approx(loss(w, q.dequantize(), damped(h)), rel=1e-9) and report.loss < report.loss_rtn
        )
        assert torch.equal(stored_scale(q.scale, spec), q.scale) and torch.equal(q.scale, rtn(w, spec).scale)
        assert not torch.equal(q.scale, rtn(w, replace(spec, scale=None)).scale)
        with pytest.raises(SolverError, match="use static_groups=True"):
            gptq(w, spec, h, static_groups=False, **mode)
    assert same(gptq(w, spec, h, dtype=torch.float64)[0], by_column(w, spec, h))
    for clip in ("mse", "output"):
        q = rtn(w, spec, h, clip=clip)
        assert torch.equal(stored_scale(q.scale, spec), q.scale)
