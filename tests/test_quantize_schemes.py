"""Every scheme on a whole model: each runs, and its error is in its place."""

import pytest
import torch
from torch import nn

import qfx
from qfx.modules.linear import QLinear
from qfx.modules.parameter import parameter_qtensor
from qfx.passes.lower.modules import Lower
from qfx.passes.solve.rtn import Rtn
from tests.passes.discovered import TOKENS, zoo
from tests.zoo import ZOO

BOUNDS = {
    "W8A16": 0.025,
    "W8A8": 0.04,
    "W8A8_STATIC": 0.06,
    "W8A8_STATIC_ASYM": 0.05,
    "FP8": 0.12,
    "FP8_DYNAMIC": 0.12,
    "W6A6_G16": 0.12,
    "FP8_E5M2": 0.25,
    "W4A16_G16": 0.25,
    "W4A16_ASYM_G16": 0.25,
    "NF4_G16": 0.25,
    "NF4_DQ_G16": 0.25,
    "FP4_G16": 0.25,
    "FP4_BNB_G16": 0.25,
    "W4A8_G16": 0.25,
    "W4A8_DQ_G16": 0.25,
    "W4A16_CHANNEL": 0.35,
    "W3A16_G16": 0.5,
    "W2A16_G16": 1.0,
}
"""On a model of random weights, of which each output is a sum of few terms: a trained one's errors are smaller."""
ORDERED = [
    ("W8A16", "W8A8", "W8A8_STATIC", "FP8", "FP8_E5M2"),
    ("W8A16", "W4A16_G16", "W3A16_G16", "W2A16_G16"),
    ("W8A8", "W6A6_G16", "W4A8_G16", "W4A8_DQ_G16"),
    ("W4A16_ASYM_G16", "W4A16_G16", "W4A16_CHANNEL"),
    ("NF4_G16", "FP4_G16", "FP4_BNB_G16"),
    ("W8A8_STATIC_ASYM", "W8A8_STATIC"),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The relative error of the logits, of the lowered model in its own forward."""
    found = zoo("llama")
    return {scheme: run(scheme, found.model(**TOKENS[0]).logits) for scheme in BOUNDS}


@torch.no_grad()
def run(scheme: str, want: torch.Tensor) -> float:
    state = zoo("llama").fresh({"*": scheme}, ["@head"])
    for step in (Rtn(), Lower()):
        assert not step(state).misses
    q = state.graph.module
    assert sum(isinstance(m, QLinear) for m in q.modules()) == len(state.plan) == 14
    assert {layer.scheme for layer in state.report.layers} == {scheme}
    return ((q(**TOKENS[0]).logits - want).norm() / want.norm()).item()


@pytest.mark.parametrize("scheme", BOUNDS)
def test_a_scheme_runs_and_its_error_is_bounded(errors: dict[str, float], scheme: str) -> None:
    assert BOUNDS[scheme] / 5 < errors[scheme] < BOUNDS[scheme]


@pytest.mark.parametrize("schemes", ORDERED, ids="<".join)
def test_fewer_bits_cost_more(errors: dict[str, float], schemes: tuple[str, ...]) -> None:
    found = [errors[s] for s in schemes]
    assert found == sorted(found)


def test_a_recipe_of_transforms_alone_gives_a_float_model() -> None:
    model, inputs = ZOO["swiglu"].load()
    q = qfx.quantize(model, {"steps": ["smoothquant", {"outlier_suppression": {"clip": False}}]}, [inputs])
    assert not any(isinstance(m, QLinear) for m in q.modules())
    before, after = model.state_dict(), q.state_dict()
    assert list(before) == list(after) and all(t.dtype == torch.float32 for t in after.values())
    assert (q.norms[0].gain == 1).all() and not torch.equal(before["gates.0.weight"], after["gates.0.weight"])
    with torch.no_grad():
        torch.testing.assert_close(q(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)
    report = q.qfx.report
    assert report.share_quantized == 0 and report.output_error < 1e-5
    assert [s.name for s in report.steps if s.name != "discover"] == ["smoothquant", "outlier_suppression"]
    assert {f.step for f in report.folds} == {"smoothquant", "outlier_suppression"}


@torch.no_grad()
def test_experts_are_quantized_with_everything_else() -> None:
    """In one block to W8A8, in the other to W4A16; by default the routers stay float."""
    model, inputs = ZOO["mixtral"].load()
    recipe = {"schemes": {"*": "W8A8", "*.layers.1.*": "W4A16_G16"}, "ignore": ["@head", "@router"]}
    q = qfx.quantize(model, recipe, [inputs])
    schemes = {layer.name: layer.scheme for layer in q.qfx.report.layers}
    for i, scheme in enumerate(("W8A8", "W4A16_G16")):
        mlp, old = f"model.layers.{i}.mlp", model.model.layers[i].mlp
        assert schemes[f"{mlp}.gate"] is None
        assert schemes[f"{mlp}.experts.gate_up_proj"] == schemes[f"{mlp}.experts.down_proj"] == scheme
        experts: nn.Module = q.get_submodule(f"{mlp}.experts")
        assert not list(experts.parameters())
        float_weight = old.experts.gate_up_proj
        error = (parameter_qtensor(experts, "gate_up_proj").dequantize() - float_weight).norm() / float_weight.norm()
        assert (0.001 if i == 0 else 0.03) < error < (0.02 if i == 0 else 0.2)
        assert torch.equal(q.get_submodule(f"{mlp}.gate").weight, old.gate.weight)
    assert q.qfx.report.share_quantized > 0.9
    want, got = model(**inputs).logits, q(**inputs).logits
    assert 0.01 < ((got - want).norm() / want.norm()).item() < 0.4
