"""How a model is solved: what each layer is measured on, against the same walk by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.core.passes import Solved, State
from qfx.core.qtensor import dynamic_scale, fake_quantize
from qfx.core.spec import Scheme, parse_scheme
from qfx.core.stats import Hessian
from qfx.passes.solve.gptq import Gptq, gptq
from qfx.passes.solve.rtn import Rtn
from tests.passes.discovered import Discovered, inputs_of, zoo
from tests.zoo import harden

WIDTH, INNER = 24, 40
BATCHES = [{"x": torch.randn(2, 30 + i, WIDTH, generator=torch.Generator().manual_seed(i))} for i in (0, 1)]


class Block(nn.Module):
    """A perceptron with a residual; its two inner layers read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def stack() -> Discovered:
    model = Stack()
    harden(model, torch.Generator().manual_seed(0))
    return Discovered(model, BATCHES)


class ByHand:
    """The walk of the paper over `Stack`: what GPTQ makes of each weight, and the inputs that it was measured on."""

    def __init__(self, model: Stack, scheme: Scheme, sequential: bool, true_sequential: bool) -> None:
        self.scheme = scheme
        self.codes: dict[str, Tensor] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        xs = [b["x"] for b in BATCHES]
        for i, block in enumerate(model.blocks):
            hs = [block.norm(x) for x in xs]
            plain = [F.silu(block.gate(h)) * block.up(h) for h in hs]
            gate, up = (self.solve(f"blocks.{i}.{n}", getattr(block, n), hs) for n in ("gate", "up"))
            quantized = [F.silu(gate(h)) * up(h) for h in hs]
            down = self.solve(f"blocks.{i}.down", block.down, quantized if sequential and true_sequential else plain)
            after = [down(a) for a in quantized] if sequential else [block.down(a) for a in plain]
            xs = [x + a for x, a in zip(xs, after, strict=True)]

    def solve(self, name: str, linear: nn.Linear, xs: list[Tensor]) -> Callable[[Tensor], Tensor]:
        hessian = Hessian()
        for x in xs:
            hessian.update(x)
        qtensor, _ = gptq(linear.weight, self.scheme.weight, hessian.value())
        self.codes[f"{name}.weight"], self.inputs[f"{name}.weight"] = qtensor.codes, xs
        spec, weight = self.scheme.input, qtensor.dequantize()
        if spec is None:
            return lambda x: F.linear(x, weight, linear.bias)
        if spec.dynamic:
            return lambda x: F.linear(fake_quantize(x, *dynamic_scale(x, spec), spec), weight, linear.bias)
        scale = torch.cat([x.flatten() for x in xs]).abs().max() / 127
        return lambda x: F.linear(fake_quantize(x, scale, None, spec), weight, linear.bias)


def same(state: State, hand: ByHand) -> bool:
    return all(torch.equal(state.solved[w].qtensor.codes, codes) for w, codes in hand.codes.items())


@pytest.mark.parametrize("name", ["W4A16_G8", "W3A8_CHANNEL", "W4A8_G8_STATIC"])
@pytest.mark.parametrize("mode", [(True, True), (True, False), (False, False)], ids=["true", "blocks", "float"])
@torch.no_grad()
def test_each_layer_is_measured_behind_what_was_quantized_before(stack: Discovered, name: str, mode: tuple) -> None:
    state = stack.fresh({"*": name})
    Gptq(sequential=mode[0], true_sequential=mode[1])(state)
    assert set(state.solved) == set(state.plan) and len(state.solved) == 6
    for other in ((True, True), (True, False), (False, False)):
        assert same(state, ByHand(stack.model, parse_scheme(name), *other)) == (other == mode)


@torch.no_grad()
def test_within_a_block_values_are_taken_in_order(stack: Discovered) -> None:
    """So the report is in execution order, and layers of one input are solved together."""
    state = stack.fresh({"*": "W4A16_G8"})
    Gptq()(state)
    assert [layer.name for layer in state.report.layers] == [
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("gate", "up", "down")
    ]


@torch.no_grad()
def test_static_ranges_are_the_extremes_of_the_inputs_that_the_layer_gets(stack: Discovered) -> None:
    """Of the float model's for RTN; behind quantized layers for a sequential solver."""
    scheme = parse_scheme("W4A8_CHANNEL_STATIC")
    for step, mode in ((Gptq(), (True, True)), (Rtn(), (False, False))):
        state = stack.fresh({"*": scheme})
        step(state)
        hand = ByHand(stack.model, scheme, *mode)
        for weight, solved in state.solved.items():
            top = max(x.abs().max().item() for x in hand.inputs[weight])
            assert solved.input_scale is not None and solved.input_zero is None
            assert solved.input_scale.item() == pytest.approx(top / 127, rel=1e-5)


@torch.no_grad()
def test_asymmetric_static_ranges(stack: Discovered) -> None:
    state = stack.fresh({"*": "W8A8_STATIC_ASYM"})
    Rtn()(state)
    for weight, solved in state.solved.items():
        x = inputs_of(stack.model, weight.removesuffix(".weight"), BATCHES)
        scale = (x.max() - x.min()).item() / 255
        assert solved.input_scale is not None and solved.input_zero is not None
        assert solved.input_scale.item() == pytest.approx(scale, rel=1e-5)
        assert solved.input_zero.item() == round(-x.min().item() / scale)


@pytest.mark.parametrize("name", ["W4A16_G8", "W8A8", "W8A8_STATIC_ASYM"])
@pytest.mark.parametrize("model_name", ["stack", "shared_linear"])
@torch.no_grad()
def test_afterwards_the_graph_computes_with_quantized_weights_and_inputs(
    stack: Discovered, model_name: str, name: str
) -> None:
    found = stack if model_name == "stack" else zoo(model_name)
    state = found.fresh({"*": name})
    Rtn()(state)
    model = found.fresh({}).graph.module
    for weight, solved in state.solved.items():
        model.get_parameter(weight).copy_(solved.qtensor.dequantize())
        assert torch.equal(state.graph.module.get_parameter(weight), model.get_parameter(weight))
        model.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(quantizer(solved))
    for batch in found.batches:
        assert torch.equal(state.graph.run(batch), model(**batch))
    assert not torch.equal(model(**batch), found.model(**batch))


def quantizer(solved: Solved) -> Callable:
    spec, scale, zero = solved.scheme.input, solved.input_scale, solved.input_zero
    if spec is None:
        return lambda _, args: args
    if scale is None:
        return lambda _, args: fake_quantize(args[0], *dynamic_scale(args[0], spec), spec)
    return lambda _, args: fake_quantize(args[0], scale, zero, spec)


def merged(xs: list[Tensor]) -> Tensor:
    hessian = Hessian()
    for x in xs:
        hessian.update(x)
    return hessian.value()


@pytest.mark.parametrize("mode", [(True, False), (False, False)])
@torch.no_grad()
def test_a_weight_that_is_used_twice_is_solved_once_for_both(mode: tuple[bool, bool]) -> None:
    found = zoo("shared_linear")
    state = found.fresh({"*": "W4A8_G16_STATIC"})
    Gptq(sequential=mode[0], true_sequential=mode[1])(state)
    assert [layer.name for layer in state.report.layers] == ["linear", "down"]
    for name in ("linear", "down"):
        linear, solved = found.model.get_submodule(name), state.solved[f"{name}.weight"]
        x = inputs_of(found.model, name, found.batches)
        assert len(solved.linears) == 2
        want, _ = gptq(linear.weight, solved.scheme.weight, merged([x]))
        assert (solved.qtensor.codes == want.codes).float().mean() > 0.999  # sums of a different order
        first, _ = gptq(linear.weight, solved.scheme.weight, merged([x[: len(x) // 2]]))
        assert (solved.qtensor.codes == first.codes).float().mean() < 0.99
        assert solved.input_scale is not None
        assert solved.input_scale.item() == pytest.approx(x.abs().max().item() / 127, rel=1e-5)


@torch.no_grad()
def test_a_weight_that_waves_of_one_block_share_is_solved_once() -> None:
    state = zoo("shared_block").fresh({"*": "W4A8_G16_STATIC"})
    Gptq()(state)
    assert [layer.name for layer in state.report.layers] == ["block.up", "block.down", "head"]
