"""Lowering a whole model: which layers become a module, which a parameter, and that the graph's own values come out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.core.errors import KernelError
from qfx.core.passes import State
from qfx.core.report import Miss
from qfx.modules.linear import QLinear
from qfx.passes.lower import modules
from qfx.passes.lower.modules import Lower
from qfx.passes.solve.rtn import Rtn
from tests.passes.discovered import Discovered, zoo
from tests.zoo.captured import distance, floats

SCHEMES = ("W8A8", "W8A8_STATIC", "W4A16_G16", "FP8_DYNAMIC")
MODELS = ("llama", "gpt2", "falcon", "mixtral", "bert", "t5")
ROUTED = "model.layers.{}.mlp.{}"


@torch.no_grad()
def lowered(found: Discovered, scheme: str, ignore: tuple[str, ...] = ("@head",)) -> State:
    state = found.fresh({"*": scheme}, ignore)
    Rtn()(state)
    Lower()(state)
    return state


def qlinears(module: nn.Module) -> set[str]:
    return {name for name, m in module.named_modules() if isinstance(m, QLinear)}


def ops(state: State) -> dict[str, str]:
    return {layer.name: layer.op for layer in state.report.layers}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_model_computes_what_the_graph_does(name: str, scheme: str) -> None:
    found = zoo(name)
    state = found.fresh({"*": scheme}, ["@head"])
    Rtn()(state)
    before = [floats(state.graph.run(batch)) for batch in found.batches]
    result = Lower()(state)
    assert not result.misses and result.changed == len(state.plan) == len(state.report.layers)
    module = state.graph.module
    quantization = distance(floats(found.model(**found.batches[0])), before[0])
    for batch, want in zip(found.batches, before, strict=True):
        apart = distance(want, floats(module(**batch)))
        # a dynamic scale's last bit may send a value to the next code, and the layers behind it follow
        assert apart < (quantization if scheme in ("W8A8", "FP8_DYNAMIC") else 1e-5)
    assert not any(m.training for m in module.modules())
    weights = {p.data_ptr() for n, p in module.named_parameters() if n in state.plan}
    assert not weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "falcon_rw", "bert", "t5"])
def test_a_linear_that_is_a_module_becomes_one(name: str) -> None:
    """Also where the class is not nn.Linear: Conv1D keeps its weight as (in, out)."""
    state = lowered(zoo(name), "W8A8")
    assert qlinears(state.graph.module) == {w.removesuffix(".weight") for w in state.plan} != set()
    assert set(ops(state).values()) == {"int8_linear"}


def test_a_conv1d_s_module_has_the_usual_layout() -> None:
    found = zoo("gpt2")
    module = lowered(found, "W4A16_G16").graph.module.get_submodule("transformer.h.0.attn.c_attn")
    weight = found.model.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert weight.shape == (64, 192)
    assert (module.in_features, module.out_features) == (64, 192)
    assert ((module.weight - weight.T).norm() / weight.norm()).item() < 0.15
    assert torch.equal(module.bias, found.model.get_parameter("transformer.h.0.attn.c_attn.bias"))


@torch.no_grad()
def test_experts_and_routers_become_codes_of_their_own_modules() -> None:
    found = zoo("mixtral")
    state = lowered(found, "W8A8")
    module = state.graph.module
    assert {n.rpartition(".")[2] for n in qlinears(module)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for i in (0, 1):
        experts = module.get_submodule(ROUTED.format(i, "experts"))
        assert experts.gate_up_proj_codes.shape == (4, 192, 64) and experts.gate_up_proj_codes.dtype == torch.int8
        for leaf in ("gate", "experts"):
            old, new = (m.get_submodule(ROUTED.format(i, leaf)) for m in (found.model, module))
            assert type(new) is not type(old) and isinstance(new, type(old))
            assert type(new).__name__ == type(old).__name__ and not list(new.parameters())
    dequantized = {n for n, op in ops(state).items() if op == "dequantize"}
    leaves = ("gate", "experts.gate_up_proj", "experts.down_proj")
    assert dequantized == {ROUTED.format(i, leaf) for i in (0, 1) for leaf in leaves}


@torch.no_grad()
def test_attention_that_calls_no_submodule_has_quantized_parameters() -> None:
    found = zoo("multihead_attention")
    state = found.fresh({"*": "W4A16_G16"})
    Rtn()(state)
    want = floats(state.graph.run(found.batches[0]))
    Lower()(state)
    assert ops(state) == {"attention.in_proj_weight": "dequantize", "attention.out_proj": "dequantize"}
    attention = state.graph.module.attention
    assert not qlinears(state.graph.module)
    assert attention.in_proj_weight_codes.shape[0] == 3 * 64 and "in_proj_weight" not in attention._parameters
    assert attention.out_proj.weight_codes.shape[0] == 64 and isinstance(attention.out_proj, nn.Linear)
    assert distance(want, floats(state.graph.module(**found.batches[0]))) < 1e-5


@torch.no_grad()
def test_attention_that_hides_its_products_is_left_where_inputs_are_quantized() -> None:
    found = zoo("multihead_attention")
    state = found.fresh({"*": "W8A8"})
    Rtn()(state)
    result = Lower()(state)
    assert [m.where for m in result.misses] == ["attention.in_proj_weight", "attention.out_proj"]
    assert all("fused attention" in m.why and "WxA16" in m.why for m in result.misses)
    assert type(state.graph.module.attention) is nn.MultiheadAttention
    assert distance(floats(found.model(**found.batches[0])), floats(state.graph.module(**found.batches[0]))) < 0.02


class Scaled(nn.Module):
    """A product and then something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.gain


class Outer(nn.Module):
    """One of those, and experts whose weight is kept as (in, experts, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.w = Scaled(), nn.Parameter(torch.randn(16, 3, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scaled(x), torch.einsum("ebi,ieo->ebo", x, self.w)


@torch.no_grad()
def test_a_module_that_does_more_than_a_product_stays_and_a_layout_is_kept() -> None:
    found = Discovered(Outer(), [{"x": torch.randn(3, 5, 16)}])
    state = found.fresh({"*": "W4A16_G16"})
    Rtn()(state)
    want = floats(state.graph.run(found.batches[0]))
    Lower()(state)
    assert ops(state) == {"scaled": "dequantize", "w": "dequantize"}
    assert isinstance(state.graph.module.scaled, Scaled)
    assert state.graph.module.w.shape == (16, 3, 8) and state.graph.module.w_codes.shape[:2] == (3, 8)
    for a, b in zip(want, floats(state.graph.module(**found.batches[0])), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_module_that_is_used_twice_is_replaced_once() -> None:
    found = zoo("shared_linear")
    state = found.fresh({"*": "W8A8_STATIC"})
    Rtn()(state)
    want = floats(state.graph.run(found.batches[0]))
    assert Lower()(state).changed == 2
    assert qlinears(state.graph.module) == {"linear", "down"}
    assert distance(want, floats(state.graph.module(**found.batches[0]))) < 1e-5


class Tree(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"second": self.first, "other": nn.Linear(8, 8)})


def test_a_module_is_replaced_under_all_its_names() -> None:
    tree, new = Tree(), nn.Identity()
    modules.replace_module(tree, tree.first, new)
    assert tree.first is tree.inner["second"] is new
    assert isinstance(tree.inner["other"], nn.Linear)


@torch.no_grad()
def test_a_layer_that_no_op_takes_keeps_its_rounded_weight_and_is_a_miss() -> None:
    """Its weight has two output axes, which neither a linear nor a stack of experts has."""
    found = zoo("einsum")
    state = found.fresh({"*": "W4A16_G16"})
    Rtn()(state)
    want = floats(state.graph.run(found.batches[0]))
    rounded = state.graph.module.w_q.clone()
    result = Lower()(state)
    assert result.changed == 0 and [m.where for m in result.misses] == ["w_q", "w_k", "w_v"]
    first = result.misses[0]
    assert first == Miss("w_q", first.why, "lower", 4 * 8 * 64) and "w_q has 3 axes" in first.why
    assert torch.equal(state.graph.module.w_q, rounded) and not torch.equal(rounded, found.model.w_q)
    assert distance(want, floats(state.graph.module(**found.batches[0]))) < 1e-6
    for layer in state.report.layers:
        assert (layer.scheme, layer.bits, layer.op) == (None, 0, "")
        assert layer.note == f"rounded to W4A16_G16, but kept in float: {first.why.replace('w_q', layer.name)}"


@torch.no_grad()
def test_one_refusal_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modules.replace_layer

    def refuse(root: nn.Module, linear: object, weight: str, *rest: object) -> str:
        if weight.endswith("1.self_attn.o_proj.weight"):
            raise KernelError("lower: not this one")
        return original(root, linear, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(modules, "replace_layer", refuse)
    seen: list[tuple] = []
    state = zoo("llama").fresh({"*": "W8A8"}, progress=lambda *a: seen.append(a))
    Rtn()(state)
    seen.clear()
    result = Lower()(state)
    name = "model.layers.1.self_attn.o_proj"
    assert result.changed == 14 and [(m.where, m.why) for m in result.misses] == [(name, "lower: not this one")]
    assert type(state.graph.module.get_submodule(name)) is nn.Linear
    assert len(qlinears(state.graph.module)) == 14
    assert {n for n, op in ops(state).items() if not op} == {name}
    assert seen == [("lower", i, 15) for i in range(16)]
