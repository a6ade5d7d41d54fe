"""Quantized inputs in the float graph: one linear sees them and no other, and they can be taken out again."""

import pytest
import torch
from torch.nn import functional as F

from qfx.core.qtensor import dynamic_scale, fake_quantize
from qfx.core.simulate import FakeQuantize, float_input, quantize_input
from qfx.core.spec import parse_scheme
from tests.zoo.captured import captured

DYNAMIC, STATIC, ASYM = (parse_scheme(name).input for name in ("W8A4", "W4A4_STATIC", "W4A4_STATIC_ASYM"))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "einsum", "mlp"])
def test_only_that_linear_sees_the_quantized_input(name: str) -> None:
    model = captured(name)
    start, before, wanted = str(model.graph.fx), model.env(), model.run()
    nodes = model.graph.nodes
    for linear in model.linears:
        x = linear.x
        quantized = fake_quantize(before[x], *dynamic_scale(before[x], DYNAMIC), DYNAMIC)
        node = quantize_input(model.graph, linear, FakeQuantize(DYNAMIC))
        model.graph.fx.lint()
        after = model.env()
        assert linear.x is x and after[node].equal(quantized) and not quantized.equal(before[x])
        # it computes what it would have computed on that input
        assert after[linear.node].equal(model.graph.value(linear.node, {**before, node: quantized}))
        earlier = nodes[: nodes.index(linear.node)]
        others = [lin.node for lin in model.linears if lin.x is x and lin is not linear]
        assert all(after[n].equal(before[n]) for n in earlier + others if isinstance(before.get(n), torch.Tensor))
        assert not after[linear.node].equal(before[linear.node])
        assert any(node in s.nodes for s in model.graph.segments())  # they are cut anew
        float_input(model.graph, linear, node)
        assert str(model.graph.fx) == start
        assert not any(node in s.nodes for s in model.graph.segments())
    assert all(a.equal(b) for a, b in zip(wanted, model.run(), strict=True))


def test_several_linears_of_one_input_are_independent() -> None:
    model = captured("llama")
    q, k, v = model.linears[:3]
    assert q.x is k.x is v.x
    start, before = str(model.graph.fx), model.env()
    at_q = quantize_input(model.graph, q, FakeQuantize(DYNAMIC))
    at_k = quantize_input(model.graph, k, FakeQuantize(STATIC, torch.tensor(0.1)))
    after = model.env()
    assert after[v.node].equal(before[v.node]) and not after[at_q].equal(after[at_k])
    assert after[k.node].equal(F.linear(after[at_k], k.read(model.graph)))
    float_input(model.graph, q, at_q)
    assert model.env()[q.node].equal(before[q.node]) and model.env()[k.node].equal(after[k.node])
    float_input(model.graph, k, at_k)
    assert str(model.graph.fx) == start


def test_static_scales_and_zeros_are_used() -> None:
    x = torch.linspace(-3, 3, 200).view(2, 100)
    scale, zero = torch.tensor(0.25), torch.tensor(6, dtype=torch.int32)
    codes = ((x / 0.25).round() + 6).clamp(0, 15)
    assert FakeQuantize(ASYM, scale, zero)(x).equal((codes - 6) * 0.25)
    assert FakeQuantize(STATIC, scale)(x).equal((x / 0.25).round().clamp(-7, 7) * 0.25)


def test_dynamic_scales_are_taken_from_each_token() -> None:
    x = torch.randn(3, 4, 16) * torch.tensor([1e-3, 1.0, 50.0, 1e4])[:, None]
    found = FakeQuantize(DYNAMIC)(x)
    step = x.abs().amax(-1, keepdim=True) / 7
    assert ((found - x).abs() <= step * (0.5 + 1e-5)).all() and not found.equal(x)
    for dtype in (torch.bfloat16, torch.float64):
        assert FakeQuantize(DYNAMIC)(x.to(dtype)).dtype == dtype
