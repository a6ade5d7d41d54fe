"""Launch plans of modules: in Triton's interpreter, and on a GPU against the path without plans."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.core.spec import parse_scheme
from qfx.kernels import _tiled
from qfx.kernels.reference import reference_bodies
from qfx.modules import kernels as table
from qfx.modules.kernels import KERNELS, choose_kernel
from qfx.modules.linear import QLinear
from qfx.modules.merged import Whole
from tests.kernels.law import quantize_weight
from tests.zoo import ZOO

pytest.importorskip("triton")

from qfx.kernels.gpu.launch import INTERPRET
from qfx.kernels.gpu.linear8 import linear8
from qfx.kernels.gpu.plan import Plan
from tests.kernels.gpu.plans import allow_cpu

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(params=["tensors", "addresses"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for CPU tensors."""
    allow_cpu(monkeypatch, request.param)


def linear(scheme: str, out: int = 256, columns: int = 512, device: str = "cpu", kernel: bool = True) -> QLinear:
    parsed = parse_scheme(scheme)
    weight = quantize_weight(torch.randn(out, columns, device=device) / 16, parsed.weight)
    bias = torch.randn(out, device=device)
    module = QLinear.from_qtensor(weight, bias, parsed, dtype=torch.bfloat16).to(device)
    name, _ = choose_kernel(parsed, columns, out)
    if kernel and name in KERNELS:
        module.use_kernel(name)
    return module


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> Iterator[QLinear]:
    """A linear on a CPU that computes by the GPU's kernel, and may be planned."""
    from qfx.modules import linear as file

    monkeypatch.setattr(file, "_may_plan", lambda x: True)
    monkeypatch.setattr(
        table.W4A16, "call", lambda self, x, prepared, bias, *rest: _tiled.on_gpu(x, *prepared, bias, *rest[2:])
    )
    with torch.no_grad():
        yield linear("W4A16_G128", 40, 256)


def twice(module: QLinear, x: Tensor) -> Tensor:
    want = module._compute(x)
    for _ in range(2):
        assert module(x).equal(want)
    return want


@interpreted
def test_modules_keep_plans_and_their_copies_do_not(module: QLinear) -> None:
    x = torch.randn(2, 256).bfloat16()
    want, state = twice(module, x), {n: t.clone() for n, t in module.state_dict().items()}
    assert [type(p) for p in module._plans.kinds.values()] == [Plan]
    assert module(x).equal(want) and module.state_dict().keys() == state.keys()
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]
    for other in [*copies, torch.load(stream, weights_only=False)]:
        assert other._plans is None and "_plans" not in vars(other) and other(x).equal(want)
    copies[0].bias.zero_()
    assert not copies[0](x).equal(want) and module(x).equal(want)
    assert module._plans.kinds


@interpreted
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({n: t.flip(0) for n, t in m.state_dict().items()}),
        lambda m: m.load_state_dict({n: t.flip(0) for n, t in m.state_dict().items()}, assign=True),
        lambda m: setattr(m, "bias", None),
        lambda m: setattr(m, "bias", torch.ones(40)),
        lambda m: m._buffers.update(bias=torch.ones(40, dtype=torch.bfloat16)),
        lambda m: m.half().bfloat16().float(),
        lambda m: setattr(m, "kernel", "") or setattr(m, "_compute", lambda x: x.new_ones(2, 40)),
    ],
)
def test_a_module_that_changes(module: QLinear, change: Callable[[QLinear], Any]) -> None:
    x = torch.randn(2, 256).bfloat16()
    before = twice(module, x)
    change(module)
    after = module._compute(x)
    assert module(x).equal(after) and module(x).equal(after) and module(x).equal(after)
    assert not after.equal(before) or module.bias.dtype == torch.float32


@interpreted
@torch.no_grad()
def test_tensors_that_torch_swaps(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    """`swap_tensors` refuses a tensor that anything refers to."""

    def compute(self: QLinear, x: Tensor) -> Tensor:
        return linear8(x, self.weight_codes, self.weight_scale, self.bias, None, None, "int8_narrow", False)

    monkeypatch.setattr("qfx.modules.linear._may_plan", lambda x: True)
    monkeypatch.setattr(QLinear, "_compute", compute)
    module, x = linear("W8A8", 24, 64), torch.randn(2, 64).bfloat16()
    before = twice(module, x)
    assert [type(p) for p in module._plans.kinds.values()] == [Plan]
    state = {n: t.roll(1, 0) for n, t in module.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert twice(module, x).equal(before.roll(1, 1)) and module(x).equal(before.roll(1, 1))


@interpreted
def test_a_module_under_compile(module: QLinear, dynamo: None) -> None:
    x = torch.randn(2, 256).bfloat16()
    twice(module, x)
    module.kernel, module._plans = "", None
    weight = linear("W4A16_G128", 40, 256, kernel=False)
    assert torch.compile(weight, backend="eager", fullgraph=True)(x).shape == (2, 40)


SCHEMES = ["W8A8", "FP8_DYNAMIC", "W4A16_G128", "W4A8", "NF4"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_gpu(scheme: str, tokens: int) -> None:
    module = linear(scheme, device="cuda")
    x = torch.randn(1, tokens, 512, device="cuda").bfloat16()
    with torch.no_grad():
        for _ in range(2):
            assert module(x).equal(module._compute(x))
        (found,) = module._plans.kinds.values()
        # for 100 tokens the choice may be cuBLAS
        assert isinstance(found, Plan) or (tokens == 100 and "computes with aten::" in found), found
        for _ in range(3):
            other = torch.randn_like(x)
            assert module(other).equal(module._compute(other))
        with reference_bodies():
            body = module._compute(x)
            assert module(x).equal(body)
    with_grad = x.clone().requires_grad_()
    y = module(with_grad)
    assert y.equal(module(x)) and y.requires_grad
    y.float().sum().backward()
    assert with_grad.grad is not None and with_grad.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_in_a_graph_after_plans_exist(scheme: str) -> None:
    module = linear(scheme, device="cuda")
    x = torch.randn(8, 512, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
        assert any(type(p) is Plan for p in module._plans.kinds.values())
    torch.cuda.current_stream().wait_stream(stream)
    graph, known = torch.cuda.CUDAGraph(), dict(module._plans.kinds)
    with torch.cuda.graph(graph, stream=stream):
        y = module(x)
    assert module._plans.kinds == known
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert y.equal(module._compute(x)) and module(x).equal(y)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16_G32"])
@torch.no_grad()
def test_a_model_with_merged_linears(scheme: str) -> None:
    model, inputs = ZOO["llama"].load()
    recipe = {"schemes": {"*": scheme}, "ignore": ["@head"]}
    quantized = qfx.quantize(model, recipe, [inputs], progress=False).cuda().bfloat16()
    inputs = {k: v.cuda() for k, v in inputs.items()}
    qfx.lower(quantized, inputs)
    want = quantized(**inputs).logits
    for _ in range(4):
        assert quantized(**inputs).logits.equal(want)
    wholes = [m for m in quantized.modules() if isinstance(m, Whole)]
    assert wholes and all(any(type(p) is Plan for p in m._plans.kinds.values()) for m in wholes)
