"""Launch plans: what a plan launches gives the call's own bits, and what is not launches alone has no plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from qfx.kernels.gpu import launch, parts, recorded, tune
from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.gpu.linear8 import linear8
from qfx.kernels.gpu.plan import KINDS, Plan, Plans
from tests.kernels.gpu.plans import CALLS, Call, Weights, allow_cpu, bits, changed, linear8_call

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(params=["tensors", "addresses"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for CPU tensors."""
    allow_cpu(monkeypatch, request.param)


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    return CALLS[request.param][0](monkeypatch)


def counted(compute: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    calls: list[Tensor] = []
    return lambda x: (calls.append(x), compute(x))[1], calls


def forward(plans: Plans, compute: Callable[[Tensor], Tensor], weights: Weights, x: Tensor) -> Tensor:
    """As `QLinear` does."""
    y = plans(compute, weights, x)
    return compute(x) if y is None else y


def planned(call: Call) -> tuple[Plans, Callable[[Tensor], Tensor], list[Tensor]]:
    """Plans that have one for the call's input, a compute that counts, and its calls."""
    plans, (compute, calls) = Plans(), counted(call[0])
    for _ in range(2):
        assert forward(plans, compute, *call[1:]).equal(call[0](call[2]))
    assert [type(p) for p in plans.kinds.values()] == [Plan], plans.kinds
    calls.clear()
    return plans, compute, calls


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_a_plan_gives_the_bits_of_the_call(name: str, monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    call = CALLS[name][0](monkeypatch)
    plans, compute, calls = planned(call)
    (made,) = plans.kinds.values()
    assert isinstance(made, Plan) and len(made.launches) == CALLS[name][1]
    for _ in range(4):
        x = (torch.randn(call[2].shape) * 3).to(call[2].dtype)
        y, want = forward(plans, compute, call[1], x), call[0](x)
        assert y.equal(want) and y.stride() == want.stride() and y.dtype == want.dtype
    assert not calls
    for pool in parts._pools.values():
        assert not pool.any()


@interpreted
def test_an_output_stays_when_the_plan_runs_again(call: Call, on_cpu: None) -> None:
    plans, compute, _ = planned(call)
    first, other = forward(plans, compute, *call[1:]), -call[2]
    kept = first.clone()
    second = forward(plans, compute, call[1], other)
    assert first.equal(kept) and not second.equal(first)


@interpreted
def test_weights_that_are_written_to_and_replaced(call: Call, on_cpu: None) -> None:
    plans, compute, calls = planned(call)
    compute_plain, weights, x = call
    for name, t in list(weights.items()):
        if t is None:
            continue
        before = compute_plain(x)
        bits(t).copy_(bits(changed(t)))
        assert forward(plans, compute, weights, x).equal(compute_plain(x)), name
        assert name in ("zero", "x_zero") or not compute_plain(x).equal(before)
    for name, t in list(weights.items()):
        if t is None:
            continue
        weights[name] = changed(t)
        calls.clear()
        for _ in range(3):
            assert forward(plans, compute, weights, x).equal(compute_plain(x)), name
        assert calls and type(next(iter(plans.kinds.values()))) is Plan
        old, address = t.data.clone(), t.data_ptr()
        weights[name].data = old  # the same tensor over other memory
        assert old.data_ptr() != address and forward(plans, compute, weights, x).equal(compute_plain(x))


@interpreted
def test_another_weight_in_the_same_memory(call: Call, on_cpu: None) -> None:
    """What is freed is given out again: an address alone does not tell a weight from the one before it."""
    plans, compute, _ = planned(call)
    plain, weights, x = call
    before, bias = plain(x), weights["bias"]
    assert bias is not None
    weights["bias"] = bias.view(torch.float16)
    assert weights["bias"].data_ptr() == bias.data_ptr() and not plain(x).equal(before)
    for _ in range(3):
        assert forward(plans, compute, weights, x).equal(plain(x))


@interpreted
def test_plans_keep_no_weight_alive(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    import weakref

    call = linear8_call("W8A8", monkeypatch)
    plans, _, _ = planned(call)
    compute, weights, x = call
    gone = weakref.ref(weights["codes"])
    weights["codes"] = weights["codes"].clone()
    del compute, x, call
    assert gone() is None and plans.kinds


@interpreted
def test_other_shapes_strides_dtypes_and_alignments_are_other_kinds(
    monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    call = linear8_call("W8A8", monkeypatch)
    plans, compute, _ = planned(call)
    x = call[2]
    wide = torch.randn(3, 72).to(x.dtype)
    inputs = [x[:2], x.half(), wide[:, :64], wide[:, 1:65], x.t().contiguous().t()]
    for n, other in enumerate(inputs, 2):
        for _ in range(3):
            assert forward(plans, compute, call[1], other).equal(call[0](other))
        assert len(plans.kinds) == n
    reasons = [p for p in plans.kinds.values() if isinstance(p, str)]
    assert len(reasons) == 1 and "aten::clone" in reasons[0]  # the transposed one is copied


@interpreted
def test_the_number_of_kinds_is_bounded_and_plans_outlast_what_came_once(
    monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    call = linear8_call("W8A8", monkeypatch)
    plans, compute, calls = planned(call)
    for n in range(4, 4 + 2 * KINDS):
        plans(compute, call[1], torch.zeros(n, 64, dtype=call[2].dtype))
    assert len(plans.kinds) == KINDS and not calls
    assert plans(compute, call[1], call[2]) is not None and not calls


@interpreted
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda f, x: f(x * 1), "aten::mul"),
        (lambda f, x: f(x) + 1, "aten::add"),
        (lambda f, x: f(x.index_select(-1, torch.arange(x.shape[-1]))), "aten::"),
        (lambda f, x: f(x)[:, :5], "part of a tensor"),
        (lambda f, x: (f(x), x)[1], "not a tensor that the call has made"),
        (lambda f, x: f(x) if x.amax().item() < 1e9 else x, "aten::amax"),
        (lambda f, x: torch.empty(3, 3), "nothing is launched"),
        (lambda f, x: f(torch.ops.qfx.hadamard(x, 64)[0]), "aten::"),  # inside of an op
    ],
)
def test_what_is_more_than_launches_has_no_plan(
    what: Any, reason: str, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    compute, weights, x = linear8_call("W8A8", monkeypatch)
    plans = Plans()
    for _ in range(3):
        assert forward(plans, lambda v: what(compute, v), weights, x).shape == what(compute, x).shape
    (found,) = plans.kinds.values()
    assert isinstance(found, str) and reason in found


@interpreted
def test_ops_are_looked_into(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    """An op whose kernel only launches has a plan; the same op by its PyTorch body has none."""
    _, weights, x = linear8_call("W8A8", monkeypatch)
    codes, scale = weights["codes"], weights["scale"]
    assert codes is not None and scale is not None
    plans, op = Plans(), torch.ops.qfx.int8_linear

    def compute(v: Tensor) -> Tensor:
        return op(v, weights["codes"], weights["scale"], weights["bias"])

    for _ in range(2):
        forward(plans, compute, weights, x)
    (found,) = plans.kinds.values()
    assert isinstance(found, str) and "computes with aten::" in found

    @torch.library.custom_op("qfx_test::linear", mutates_args=())
    def ours(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return op(x, codes, scale)

    @ours.register_kernel("cpu")
    def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return linear8(x, codes, scale, None, None, None, "int8_narrow", False)

    monkeypatch.setattr(recorded, "NAMESPACE", "qfx_test")

    def launches(v: Tensor) -> Tensor:
        return ours(v, weights["codes"], weights["scale"])

    plans = Plans()
    with ours.set_kernel_enabled("cpu", False):  # as in `reference_bodies`
        for _ in range(3):
            forward(plans, launches, weights, x)
        assert not any(type(p) is Plan or "computes" in p for p in plans.kinds.values())
    forward(plans, launches, weights, x)
    (found,) = plans.kinds.values()
    assert isinstance(found, Plan) and len(found.launches) == 2
    with ours.set_kernel_enabled("cpu", False):
        assert plans(launches, weights, x) is None
    got = plans(launches, weights, x)
    assert got is not None and got.equal(launches(x))


@interpreted
def test_what_the_watch_does_not_see_fails_the_check(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    call, weights, x = linear8_call("W8A8", monkeypatch)
    x = x.float()

    def compute(v: Tensor) -> Tensor:
        y = call(v)
        y.numpy()[:] += 1  # no operator
        return y

    plans = Plans()
    for _ in range(3):
        assert forward(plans, compute, weights, x).equal(compute(x))
    assert list(plans.kinds.values()) == ["the launches alone do not give the output"]


@interpreted
def test_nothing_is_planned_where_somebody_watches(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    call = linear8_call("W8A8", monkeypatch)
    plans, compute, calls = planned(call)
    _, weights, x = call

    def none() -> bool:
        return plans(compute, weights, x) is None

    with FlopCounterMode(display=False):
        assert none()
    with torch.device("cpu"):  # a mode of functions
        assert none()
    with launch.recording(lambda *_: None):
        assert none()
    torch.func.vmap(lambda _: x if none() else 1 / 0)(torch.zeros(2))
    x.requires_grad_()
    assert none()
    with torch.no_grad():
        assert not none()
    x.requires_grad_(False)
    weights["bias"].requires_grad_()
    assert none()
    weights["bias"].requires_grad_(False)
    with tune.autotune():  # configurations are chosen anew
        for _ in range(3):
            assert forward(plans, compute, weights, x).equal(call[0](x))
        assert not any(type(p) is Plan for p in plans.kinds.values())
    calls.clear()
    for _ in range(3):
        assert forward(plans, compute, weights, x).equal(call[0](x))
    assert calls and not none()


@interpreted
def test_another_thread_launches_meanwhile(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    call, weights, x = linear8_call("W8A8", monkeypatch)
    others: list[Tensor] = []

    def compute(v: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: others.append(call(v)))
        thread.start()
        thread.join()
        return call(v)

    plans = Plans()
    for _ in range(3):
        assert forward(plans, compute, weights, x).equal(call(x))
    (found,) = plans.kinds.values()
    assert isinstance(found, Plan) and len(found.launches) == 2 and others[0].equal(call(x))
